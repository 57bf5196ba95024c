"""Command line and environment of a trainer on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import post_training

_KEPT_BACK = "AIRFLOW"
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
"""glibc keeps freed memory: activations come and go each step, and fresh pages cost more than old ones."""

_THREADS = {"GOMP_SPINCOUNT": "1000"}
"""How long OpenMP's waiting threads spin. By default so long that two trainers on one processor starve each
other; this costs a lone one nothing that could be measured."""

_SITE_FOLDERS = ("site-packages", "dist-packages")


def trainer_argv(python: str, spec: Path) -> list[str]:
    """Return the command that trains what ``spec`` says."""
    return [python, "-m", "lightning_modules.train", str(spec)]


def trainer_environment(inherited: Mapping[str, str], credentials: Mapping[str, str]) -> dict[str, str]:
    """Return the trainer's environment: the task's own, without Airflow's variables, which hold secrets.

    :param credentials: variables by which the trainer's MLflow client logs in.
    """
    environment = {
        key: value for key, value in inherited.items() if not key.lstrip("_").startswith(_KEPT_BACK)
    }
    search_path = [*_source_folders(), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **_THREADS,
        **environment,
        **credentials,
        "PYTHONPATH": os.pathsep.join(search_path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **_ALLOCATOR,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _source_folders() -> list[str]:
    """Return the folders of the sources where they run from a checkout; an installed package needs none."""
    plugins = Path(post_training.__file__).resolve().parents[1]
    return [] if plugins.name in _SITE_FOLDERS else [str(plugins), str(plugins.parent)]
