"""Command line and environment of a trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from post_training.launch import local
from post_training.launch.local import TRAIN, trainer_of, worker_argv, worker_environment

ROOT = Path(__file__).resolve().parents[2]


def test_the_trainer_is_started_by_name() -> None:
    assert worker_argv("/opt/train/python", TRAIN, Path("/jobs/1/spec.json")) == [
        "/opt/train/python",
        "-m",
        "lightning_modules.train",
        "/jobs/1/spec.json",
    ]


def test_several_devices_have_a_launcher_of_their_trainers() -> None:
    assert [trainer_of(devices) for devices in (1, 2)] == [
        "lightning_modules.train",
        "lightning_modules.elastic",
    ]


def test_airflows_secrets_stay_behind_and_mlflows_come_along() -> None:
    inherited = {
        "PATH": "/bin",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "secret",
        "AIRFLOW_CONN_X": "secret",
        "_AIRFLOW_PROCESS_CONTEXT": "client",
        "PYTHONPATH": "/own",
    }
    environment = worker_environment(inherited, {"MLFLOW_TRACKING_PASSWORD": "theirs"})
    assert not [name for name in environment if "AIRFLOW" in name]
    assert environment["PATH"] == "/bin"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "theirs"


def test_a_checkouts_sources_come_first_on_the_search_path() -> None:
    environment = worker_environment({"PYTHONPATH": "/own"}, {})
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT / "plugins"), str(ROOT), "/own"]


def test_what_the_operator_set_for_its_worker_stands() -> None:
    assert worker_environment({}, {})["GOMP_SPINCOUNT"] == "1000"
    assert worker_environment({"GOMP_SPINCOUNT": "5"}, {})["GOMP_SPINCOUNT"] == "5"
    assert worker_environment({"MALLOC_TOP_PAD_": "5"}, {})["MALLOC_TOP_PAD_"] == "5"


@pytest.mark.skipif(local.tcmalloc() is None, reason="needs tcmalloc, as .ci/run installs it")
def test_memory_comes_from_tcmalloc() -> None:
    environment = worker_environment({"PATH": os.environ["PATH"]}, {})
    maps = subprocess.run(
        [sys.executable, "-c", "print(open('/proc/self/maps').read())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert maps.stderr == ""
    assert "libtcmalloc" in maps.stdout


def test_an_allocator_that_is_chosen_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "tcmalloc", lambda: "libtcmalloc.so.4")
    preloads = {
        None: "libtcmalloc.so.4",
        "a.so": "a.so:libtcmalloc.so.4",
        "": "",
        "libjemalloc.so.2": "libjemalloc.so.2",
    }
    for chosen, preloaded in preloads.items():
        inherited = {} if chosen is None else {"LD_PRELOAD": chosen}
        assert worker_environment(inherited, {})["LD_PRELOAD"] == preloaded


def test_without_tcmalloc_nothing_is_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "tcmalloc", lambda: None)
    assert "LD_PRELOAD" not in worker_environment({}, {})
