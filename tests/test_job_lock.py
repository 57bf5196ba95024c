"""One attempt at a time on a job's folder: claims, and a lock that lives as long as its processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from post_training.errors import SupersededError, TrainerError
from post_training.job_lock import claim, locked, newest_claim, note_holder

HOLD = """
import os, sys, time
from pathlib import Path
from post_training.job_lock import locked, note_holder
with locked(Path(sys.argv[1])):
    note_holder(Path(sys.argv[1]), os.getpid())
    print("held", flush=True)
    time.sleep(60)
"""
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
PLUGINS = Path(__file__).parents[1] / "plugins"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's folder that nobody has made yet, below another that is missing too."""
    return tmp_path / "jobs" / "job-1"


@pytest.fixture
def started() -> Iterator[Any]:
    """Start processes; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(PLUGINS)}
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)
        )
        assert processes[-1].stdout is not None
        assert processes[-1].stdout.readline()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def hold(started: Any, folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock, and is written down as the trainer."""
    process: subprocess.Popen[str] = started([sys.executable, "-c", HOLD, str(folder)])
    return process


def is_free(folder: Path) -> bool:
    try:
        with locked(folder, give_up=lambda: True):
            return True
    except TrainerError:
        return False


def test_the_newest_claim_counts_and_an_older_attempt_is_told_so(folder: Path) -> None:
    assert newest_claim(folder) == ""
    claim(folder, "0199-a")
    claim(folder, "0199-a")  # the same attempt, started again
    claim(folder, "0199-b")
    assert newest_claim(folder) == "0199-b"
    with pytest.raises(SupersededError, match="A newer attempt at this job runs"):
        claim(folder, "0199-a")
    assert newest_claim(folder) == "0199-b"
    assert [path.name for path in folder.parent.iterdir()] == ["job-1.claim"]


def test_claims_of_other_jobs_do_not_count(folder: Path) -> None:
    claim(folder.with_name("job-10"), "0199-b")
    claim(folder.with_name("job"), "0199-b")
    assert newest_claim(folder) == ""


def test_one_holds_the_lock_until_it_leaves(folder: Path) -> None:
    with locked(folder):
        assert not is_free(folder)
        assert is_free(folder.with_name("job-2"))
    assert is_free(folder)
    with pytest.raises(ZeroDivisionError), locked(folder):
        _ = 1 / 0
    assert is_free(folder)
    assert folder.with_name("job-1.lock").stat().st_mode & 0o077 == 0


def test_the_lock_is_free_as_soon_as_its_process_is_killed(folder: Path, started: Any) -> None:
    process = hold(started, folder)
    assert not is_free(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(folder, patience=5.0):
        pass


def test_a_child_holds_the_lock_beyond_its_parent(folder: Path, started: Any) -> None:
    with locked(folder) as descriptor:
        child = started(SLEEP, pass_fds=[descriptor])
    assert not is_free(folder)
    child.kill()
    child.wait()
    assert is_free(folder)


def test_a_child_that_is_not_given_the_lock_does_not_hold_it(folder: Path, started: Any) -> None:
    with locked(folder):
        started(SLEEP)
    assert is_free(folder)


def test_a_trainer_that_does_not_end_is_killed_after_the_patience(folder: Path, started: Any) -> None:
    process = hold(started, folder)
    began = time.monotonic()
    with locked(folder, patience=2.0):  # and within as long again
        assert time.monotonic() - began >= 2.0
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("changes", [{"host": "another-host"}, {"started": 0.0}])
def test_a_process_that_is_not_the_trainer_is_not_killed(
    changes: dict[str, Any], folder: Path, started: Any
) -> None:
    """Another machine's process has the same number, or the number was given to another process since."""
    process = hold(started, folder)
    file = folder.with_name("job-1.holder")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(TrainerError, match="An earlier attempt at this job has not ended yet"):
        with locked(folder, patience=0.3):
            pass
    assert process.poll() is None


@pytest.mark.parametrize("content", [None, "", "{"])
def test_an_unknown_holder_is_waited_for(content: str | None, folder: Path, started: Any) -> None:
    process = hold(started, folder)
    file = folder.with_name("job-1.holder")
    file.unlink()
    if content is not None:
        file.write_text(content)
    began = time.monotonic()
    with pytest.raises(TrainerError), locked(folder, patience=0.3):
        pass
    assert time.monotonic() - began >= 2 * 0.3
    assert process.poll() is None


def test_waiting_can_be_given_up(folder: Path, started: Any) -> None:
    hold(started, folder)
    asked = iter([False, False, True])
    with pytest.raises(TrainerError), locked(folder, give_up=lambda: next(asked)):
        pass
    assert next(asked, None) is None


def test_the_holder_is_this_machine_s_process(folder: Path, started: Any) -> None:
    folder.parent.mkdir(parents=True)
    note_holder(folder, os.getpid())
    written = json.loads(folder.with_name("job-1.holder").read_text())
    assert written == {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def test_a_trainer_that_has_ended_already_is_not_written_down(folder: Path, started: Any) -> None:
    folder.parent.mkdir(parents=True)
    ended = started(SLEEP)
    ended.kill()
    ended.wait()
    note_holder(folder, ended.pid)
    assert not folder.with_name("job-1.holder").exists()
