"""A child process that is read, stopped, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

import psutil
import pytest

from post_training.launch.process import WorkerProcess
from tests.waiting import wait_until

DEADLINE = 20.0


def child(tmp_path: Path, program: str, grace_seconds: float = 3.0) -> WorkerProcess:
    argv = [sys.executable, "-u", "-c", program]
    return WorkerProcess(argv, dict(os.environ), tmp_path / "log", grace_seconds=grace_seconds)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: gone(pid), DEADLINE)


def test_output_is_read_and_kept(tmp_path: Path) -> None:
    process = child(tmp_path, "import sys; print('one'); print('two', file=sys.stderr)")
    assert list(process.lines()) == ["one", "two"]
    assert process.exit_code() == 0
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("log", ["/dev/full", "/no/folder/log"])
def test_output_that_cannot_be_kept_is_read_to_its_end(log: str) -> None:
    program = "for number in range(200): print('x' * 1000)"  # more than a pipe holds
    process = WorkerProcess([sys.executable, "-c", program], dict(os.environ), Path(log))
    assert list(process.lines()) == ["x" * 1000] * 200
    assert process.exit_code() == 0


@pytest.mark.parametrize(
    ("program", "code"),
    [("raise SystemExit(3)", 3), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9)],
)
def test_the_exit_code_tells_how_it_ended(tmp_path: Path, program: str, code: int) -> None:
    process = child(tmp_path, program)
    assert list(process.lines()) == []
    assert process.exit_code() == code
    assert not process.stopped


def test_stop_lets_the_child_end_by_itself(tmp_path: Path) -> None:
    program = (
        "import signal, sys, threading\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saving'), sys.exit(5)))\n"
        "print('ready')\n"
        "threading.Event().wait()\n"
    )
    process = child(tmp_path, program, grace_seconds=600)
    seen = []
    for line in process.lines():
        seen.append(line)
        process.stop()
    assert seen == ["ready", "saving"]
    assert process.stopped
    assert process.exit_code() == 5


def test_a_child_that_does_not_listen_is_killed_after_its_grace(tmp_path: Path) -> None:
    program = (
        "import signal, threading\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready')\n"
        "threading.Event().wait()\n"
    )
    process = child(tmp_path, program, grace_seconds=0.1)
    for _ in process.lines():
        process.stop()
    assert process.exit_code() == -signal.SIGKILL


@pytest.mark.parametrize("own_group", [True, False])
def test_a_child_in_a_group_of_its_own_is_spared_the_terminals_signals(
    tmp_path: Path, own_group: bool
) -> None:
    argv = [sys.executable, "-c", "import os; print(os.getpgrp())"]
    process = WorkerProcess(argv, dict(os.environ), tmp_path / "log", own_group=own_group)
    (line,) = list(process.lines())
    assert (int(line) == os.getpgrp()) is not own_group


def test_who_asks_again_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    program = (
        "import signal, threading\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('saving'))\n"
        "print('ready')\n"
        "while True: threading.Event().wait(1)\n"
    )
    process = child(tmp_path, program, grace_seconds=3600)
    for line in process.lines():
        process.stop(at_once=line == "saving")
    assert process.exit_code() == -signal.SIGKILL


def test_a_grandchild_that_holds_the_pipe_does_not_hold_us(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\n"
        "held = subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait(60)'])\n"
        "print(held.pid)\n"
    )
    process = child(tmp_path, program)
    started = monotonic()
    (line,) = list(process.lines())
    assert monotonic() - started < DEADLINE
    os.kill(int(line), signal.SIGKILL)
    assert process.exit_code() == 0


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    parent_program = f"""
import os, sys
from pathlib import Path
from post_training.launch.process import WorkerProcess
from tests.waiting import wait_until
wait = "import threading; print('ready'); threading.Event().wait()"
command = [sys.executable, "-u", "-c", wait]
process = WorkerProcess(command, dict(os.environ), Path({str(tmp_path)!r}) / "log")
for line in process.lines():
    print(process.pid, flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone(pid)
