"""Whether a job trains on, read from the logs in its folder, which no outage hides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_PROGRESS = "progress step "


def logs_of(home: Path, job_uuid: str) -> list[Path]:
    """The trainer's logs of a job in the order of its attempts; they lie below ``jobs/DAG/JOB/TASK``."""
    logs = (home / "jobs").glob(f"**/{job_uuid}/train/train-*.log")
    return sorted(logs, key=lambda log: int(log.stem.removeprefix("train-")))


def trains(home: Path, job_uuid: str) -> bool:
    """Return whether the newest attempt has trained a step."""
    return any(_PROGRESS in log.read_text(errors="replace") for log in logs_of(home, job_uuid)[-1:])


def progress_after(home: Path, job_uuid: str) -> Callable[[], bool]:
    """Return whether a later attempt than those that exist now has trained a step.

    A job whose folder is gone has ended, and so is no longer waited for.
    """
    known = set(logs_of(home, job_uuid))

    def progressed() -> bool:
        logs = logs_of(home, job_uuid)
        return not logs or any(_PROGRESS in log.read_text(errors="replace") for log in set(logs) - known)

    return progressed
