"""Command line and environment of a process on this machine that trains, evaluates or prepares data."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from functools import lru_cache
from pathlib import Path

import post_training

TRAIN, TRAIN_TOGETHER, EVALUATE, PREPARE = (
    f"lightning_modules.{name}" for name in ("train", "elastic", "evaluate", "prepare")
)
"""Programs, started by their name: each reads the spec that it is given."""

_KEPT_BACK = "AIRFLOW"
TUNING = {
    # How long OpenMP's waiting threads spin. By default so long that two trainers on one processor starve
    # each other; this costs a lone one nothing that could be measured.
    "GOMP_SPINCOUNT": "1000",
    # glibc keeps freed memory: activations come and go each step, and fresh pages cost more than old ones.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
    # A tensor of more than a gigabyte is nothing that tcmalloc has to report.
    "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**62),
}
"""Environment variables of a process that computes, where nobody has set others."""

_TCMALLOC = ("tcmalloc_minimal", "tcmalloc")
_SITE_FOLDERS = ("site-packages", "dist-packages")


def trainer_of(devices: int) -> str:
    """Return the program that trains on so many devices: one process, or torchrun with one for each."""
    return TRAIN if devices == 1 else TRAIN_TOGETHER


def worker_argv(python: str, program: str, spec: Path) -> list[str]:
    """Return the command that does what ``spec`` says.

    :param program: the module that reads it.
    """
    return [python, "-m", program, str(spec)]


def worker_environment(inherited: Mapping[str, str], credentials: Mapping[str, str]) -> dict[str, str]:
    """Return the process's environment: the task's own, without Airflow's variables, which hold secrets.

    :param credentials: variables by which its MLflow client logs in.
    """
    environment = {
        key: value for key, value in inherited.items() if not key.lstrip("_").startswith(_KEPT_BACK)
    }
    search_path = [*_source_folders(), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **TUNING,
        **environment,
        **credentials,
        "PYTHONPATH": os.pathsep.join(search_path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **_preload(inherited),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _preload(inherited: Mapping[str, str]) -> dict[str, str]:
    """Load tcmalloc, where there is one, before the C library; an ``LD_PRELOAD`` that is empty is a no.

    Activations of ever other sizes fragment glibc's heap; tcmalloc holds them in a sixth less memory, and a
    step is a tenth faster.
    """
    chosen, library = inherited.get("LD_PRELOAD"), tcmalloc()
    if library is None or chosen == "" or "malloc" in (chosen or ""):
        return {}
    return {"LD_PRELOAD": library if chosen is None else f"{chosen}:{library}"}


@lru_cache(maxsize=1)
def tcmalloc() -> str | None:
    """Return the name by which the loader finds tcmalloc, gperftools' library; None without one."""
    if sys.platform != "linux":
        return None
    return next(filter(None, map(find_library, _TCMALLOC)), None)


def _source_folders() -> list[str]:
    """Return the folders of the sources where they run from a checkout; an installed package needs none."""
    plugins = Path(post_training.__file__).resolve().parents[1]
    return [] if plugins.name in _SITE_FOLDERS else [str(plugins), str(plugins.parent)]
