"""Ending a whole tree of processes, also from another process and after its leader has died."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import psutil  # type: ignore[import-untyped]

_SAME_START_SECONDS = 2.0
_KILL_PATIENCE = 60.0


@dataclass(frozen=True)
class SessionRecord:
    """A process that leads a session, in a form that can be written down.

    :param pid: process id of the leader, which is the session's id.
    :param started: when it started, in seconds since the epoch.
    :param folder: working folder of the leader and its children.
    """

    pid: int
    started: float
    folder: str

    @classmethod
    def of(cls, pid: int, folder: Path) -> SessionRecord:
        """Describe a running leader.

        :raises psutil.NoSuchProcess: if it has ended.
        """
        return cls(pid, psutil.Process(pid).create_time(), str(folder))


def session_alive(session: SessionRecord) -> bool:
    """Whether any process of the session runs."""
    return bool(_members(session))


def end_sessions(*sessions: SessionRecord, grace: float = 20.0) -> None:
    """Ask every process of the sessions to end, then kill what is left.

    Descendants that lead sessions of their own are ended with it as long as their parents live.

    :param grace: seconds between SIGTERM and SIGKILL.
    :raises RuntimeError: if a process survives SIGKILL.
    """
    known = _members(*sessions)
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILL_PATIENCE)):
        known |= _members(*sessions)
        _signal_groups(known, number)
        deadline = monotonic() + patience
        while alive := _alive(known | _members(*sessions)):
            if monotonic() > deadline:
                break
            sleep(0.05)
        if not alive:
            return
    raise RuntimeError(f"processes survived SIGKILL: {sorted(process.pid for process in alive)}")


def kill_session(session: SessionRecord) -> None:
    """Send SIGKILL to every process of the session at once, without a word before."""
    _signal_groups(_members(session), signal.SIGKILL)


def kill_leader(session: SessionRecord) -> None:
    """Send SIGKILL to the leader alone; what it has started goes on."""
    for process in _members(session):
        if process.pid == session.pid:
            process.kill()


def _members(*sessions: SessionRecord) -> set[psutil.Process]:
    """Find the sessions' processes, and the leaders' other descendants."""
    found: set[psutil.Process] = set()
    folders: dict[int, str | None] = {}  # by session id; None where the leader lives, and so holds the id
    for session in sessions:
        try:
            leader = psutil.Process(session.pid)
            descendants = set(leader.children(recursive=True)) | {leader}
            if not started_at(leader, session.started):
                continue  # the pid was given away, so nothing of the session can be left
            found |= descendants
            folders[session.pid] = None
        except psutil.NoSuchProcess:
            folders[session.pid] = session.folder
    for process in psutil.process_iter():
        session_id = _session_id(process)
        if session_id in folders:
            folder = folders[session_id]
            if folder is None or _works_in(process, folder):
                found.add(process)
    return _alive(found)


def started_at(process: psutil.Process, started: float) -> bool:
    """Whether this is the process that started then, and not a later one of its id."""
    return abs(float(process.create_time()) - started) <= _SAME_START_SECONDS


def _alive(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Leave out the dead, and zombies: in a container nobody may ever collect them."""
    alive = set()
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.add(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def _signal_groups(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    groups = set()
    for process in _alive(processes):
        try:
            groups.add(os.getpgid(process.pid))
        except ProcessLookupError:
            continue
    for group in groups - {os.getpgrp()}:
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            continue


def _session_id(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def _works_in(process: psutil.Process, folder: str) -> bool:
    try:
        return str(process.cwd()) == folder
    except psutil.Error:
        return False
