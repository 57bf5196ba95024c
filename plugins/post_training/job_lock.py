"""One attempt at a job at a time: a lock on the job's folder, and whose turn it is.

The newest attempt claims the folder and waits until the one before has ended. An attempt that finds a newer
claim is superseded: it stops. The lock is held by open files, the task's and the trainer's, so it is free as
soon as both processes are gone, however they went. Beside the folder lie:

- ``NAME.lock``: what is locked (flock),
- ``NAME.claim``: the id of the newest attempt,
- ``NAME.holder``: JSON of the trainer that runs: host, pid, and when it started.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

import psutil  # type: ignore[import-untyped]

from post_training.errors import SupersededError, TrainerError
from post_training.processes import started_at

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""How long an attempt that was superseded may take to end; then its trainer is killed."""

_POLL_SECONDS = 0.2


def claim(folder: Path, attempt_id: str) -> None:
    """Make an attempt the newest.

    :param attempt_id: greater than that of every attempt before.
    :raises SupersededError: if a later attempt has claimed the folder.
    """
    if newest_claim(folder) > attempt_id:
        raise SupersededError("A newer attempt at this job runs.")
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = _beside(folder, f"claim.{os.getpid()}")
    draft.write_text(attempt_id)
    draft.replace(_beside(folder, "claim"))


def newest_claim(folder: Path) -> str:
    """Return the id of the attempt that claimed the folder last; empty where none did."""
    try:
        return _beside(folder, "claim").read_text()
    except FileNotFoundError:
        return ""


@contextmanager
def locked(
    folder: Path,
    *,
    patience: float = PATIENCE_SECONDS,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Hold the folder's lock; yields the file descriptor by which a child process may hold it too.

    :param patience: seconds after which the trainer that holds it is killed, if it is on this machine.
    :param give_up: asked while waiting.
    :raises TrainerError: if it is not free after twice the patience, or waiting was given up.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(_beside(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        started = monotonic()
        killed = False
        while not taken(descriptor):
            waited = monotonic() - started
            if give_up() or waited > 2 * patience:
                raise TrainerError("An earlier attempt at this job has not ended yet.")
            if waited > patience and not killed:
                killed = True
                _kill_holder(folder)
            sleep(_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def note_holder(folder: Path, pid: int) -> None:
    """Write down the trainer that runs in the folder."""
    with suppress(psutil.NoSuchProcess):  # it has ended, which its parent will see
        holder = {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}
        _beside(folder, "holder").write_text(json.dumps(holder))


def taken(descriptor: int) -> bool:
    """Lock an open file or folder for its holder alone (flock); return whether nobody else holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _kill_holder(folder: Path) -> None:
    """Kill the trainer of the attempt before, if it is the process that was written down."""
    with suppress(FileNotFoundError, json.JSONDecodeError, psutil.NoSuchProcess):
        holder = json.loads(_beside(folder, "holder").read_text())
        if holder["host"] != socket.gethostname():
            logger.warning("an earlier attempt's trainer runs on %s and does not end", holder["host"])
            return
        process = psutil.Process(holder["pid"])
        if started_at(process, holder["started"]):
            logger.warning("killing the trainer of an earlier attempt, process %d", process.pid)
            process.kill()


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
