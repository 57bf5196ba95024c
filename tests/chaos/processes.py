"""The processes of one home: which job each trainer, task and supervisor belongs to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

SPEC = "spec.json"
_IDLE_WORKER = "LocalExecutor: <idle>"


@dataclass(frozen=True)
class JobProcesses:
    """The chain of a running job; a parent that has died is None."""

    trainer: psutil.Process
    task: psutil.Process | None
    supervisor: psutil.Process | None


def of_home(home: Path) -> list[psutil.Process]:
    """Every other living process that works in the home or names it in its command or as Airflow's home."""
    ours = os.getpid()
    return [p for p in psutil.process_iter() if p.pid != ours and _belongs(p, str(home))]


def running_jobs(home: Path) -> dict[str, JobProcesses]:
    """The processes of each job that has a trainer, by job id.

    A job's folder is ``jobs/DAG/JOB/TASK``; its trainer has the path of ``spec.json`` in its command.
    """
    found = {}
    for process in of_home(home):
        spec = next((Path(part) for part in command_of(process) if part.endswith(f"/{SPEC}")), None)
        if spec is not None:
            task = _parent(process, home)
            found[spec.parts[-3]] = JobProcesses(process, task, task and _parent(task, home))
    return found


def idle_orphans(home: Path) -> list[psutil.Process]:
    """Workers of a scheduler that was killed: they wait for ever for its next task."""
    return [
        process
        for process in of_home(home)
        if any(_IDLE_WORKER in part for part in command_of(process)) and _parent(process, home) is None
    ]


def command_of(process: psutil.Process) -> list[str]:
    """The command line, empty for one that has ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _parent(process: psutil.Process, home: Path) -> psutil.Process | None:
    """The parent, unless it is not of this home: an orphan's is init."""
    try:
        parent = process.parent()
    except psutil.NoSuchProcess:
        return None
    return parent if parent is not None and _belongs(parent, str(home)) else None


def _belongs(process: psutil.Process, home: str) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        folder = process.cwd()
        return (
            folder == home
            or folder.startswith(f"{home}/")
            or any(f"{home}/" in part for part in process.cmdline())
            or process.environ().get("AIRFLOW_HOME", "").startswith(f"{home}/")
        )
    except psutil.Error:
        return False
