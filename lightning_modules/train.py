"""The trainer process: ``python -m lightning_modules.train /path/to/spec.json``.

Exit codes: 0 completed, 1 failed (the reason is in ``result.json``), 143 stopped by SIGTERM, or since a newer
attempt at the job runs.

torchrun starts one for each device. The first one then does what a process alone does. The others only
compute: they end with 0 when the first has told them to stop, so that torchrun leaves it the time to end, and
write a failure of theirs into a file of their own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from lightning_modules.lean_imports import leave_out_unused
from lightning_modules.process import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    StopRequestedError,
    describe,
    importing,
    is_permanent,
    log_plainly,
    quieten_libraries,
    spec_file,
)
from lightning_modules.ranks import ALONE, Ranks, place_in
from lightning_modules.silent_record import SilentRecord
from lightning_modules.trained import Trained, job_of, read_trained, write_trained, write_whole
from post_training.errors import DivergenceError, InputsChangedError
from post_training.job_lock import newest_claim
from post_training.schemas.trainer import RESULT_FILE, TrainerResult, TrainerSpec

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

EXIT_STOPPED = 143
PROGRESS_SECONDS = 5.0
LAUNCHER = "POST_TRAINING_LAUNCHER"
"""Environment variable: process id of the launcher that a trainer ends with."""

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Train what a spec file describes; return the process's exit code."""
    path = spec_file("lightning_modules.train", argv)
    if path is None:
        return EXIT_FAILED
    attempt = Attempt(path.parent, place_in(os.environ))
    end_with_launcher()
    signal.signal(signal.SIGTERM, lambda signum, frame: attempt.stop.set())
    try:
        spec = attempt.spec = TrainerSpec.model_validate_json(path.read_bytes())
        if attempt.superseded():
            return attempt.stopped()
        attempt.result_file.unlink(missing_ok=True)  # an earlier attempt's
        result = take_part(spec, attempt)
    except Exception as error:
        # Only the first process sees what the record says, and all of them stop.
        stopped = isinstance(error, StopRequestedError) or attempt.should_stop()
        if stopped and not isinstance(error, InputsChangedError):
            return attempt.stopped()
        return attempt.leave(failure_of(error), EXIT_FAILED)
    if attempt.should_stop():
        return attempt.stopped()
    return EXIT_COMPLETED if result is None else attempt.leave(result, EXIT_COMPLETED)


def failure_of(error: Exception) -> TrainerResult:
    """Return the result of an attempt that an error has ended."""
    if isinstance(error, InputsChangedError):
        return TrainerResult(status="inputs_changed", error=str(error))
    return TrainerResult(
        status="failed",
        error=describe(error),
        permanent=is_permanent(error),
        diverged=isinstance(error, DivergenceError),
    )


def end_with_launcher() -> None:
    """Be killed when the launcher that started this process is gone; whoever killed it meant the job."""
    if LAUNCHER in os.environ and sys.platform == "linux":
        from post_training.parent_death import die_with  # noqa: PLC0415 - of Linux alone

        die_with(int(os.environ[LAUNCHER]))()


@dataclass
class Attempt:
    """Whether this process is still wanted, and where it leaves its result."""

    folder: Path
    place: Ranks = ALONE
    spec: TrainerSpec | None = None
    record: JobRecord | None = None
    stop: Event = field(default_factory=Event)

    @property
    def attempt_id(self) -> str:
        """The spec's; empty before it was read."""
        return self.spec.attempt_id if self.spec is not None else ""

    @property
    def result_file(self) -> Path:
        """Where the operator looks for the result, and the launcher for a failure of another process."""
        folder = self.spec.work_dir if self.spec is not None else self.folder
        return folder / (RESULT_FILE if self.place.first else failure_file(self.place.rank))

    def superseded(self) -> bool:
        """Whether a newer attempt has claimed the job's folder or its run."""
        if self.spec is None or not self.attempt_id:
            return False
        claimed = newest_claim(self.spec.work_dir) > self.attempt_id
        return claimed or (self.record is not None and self.record.superseded)

    def should_stop(self) -> bool:
        """Whether to save the state and end."""
        return self.stop.is_set() or self.superseded()

    def leave(self, result: TrainerResult, code: int) -> int:
        """Write the result, and return the exit code: that of a failure where there is no result to read."""
        if result.error:
            print(f"failed: {result.error}", file=sys.stderr)
        try:
            write_result(self.result_file, result, self.attempt_id)
        except OSError as error:
            print(f"failed: the result cannot be written: {error}", file=sys.stderr)
            return EXIT_FAILED
        return code

    def stopped(self) -> int:
        """Say why it stops, and return the exit code."""
        if not self.place.first:
            return EXIT_COMPLETED
        reason = "stopped by SIGTERM" if self.stop.is_set() else "cancelled, or a newer attempt runs"
        print(reason, file=sys.stderr)
        return EXIT_STOPPED


def take_part(spec: TrainerSpec, attempt: Attempt) -> TrainerResult | None:
    """Train, alone or together with others; only the first of these has a result."""
    log_plainly(logging.INFO if attempt.place.first else logging.ERROR)
    if attempt.place.world == 1:
        return _train_and_settle(spec, attempt, ALONE)
    from lightning_modules.process_group import joined  # noqa: PLC0415 - imports torch

    with joined(attempt.place) as ranks:
        if ranks.first:
            return _train_and_settle(spec, attempt, ranks)
        if not ranks.told(False):
            _fit(spec, SilentRecord(), attempt, ranks)
        return None


def _train_and_settle(spec: TrainerSpec, attempt: Attempt, ranks: Ranks) -> TrainerResult:
    """Train, or take what an earlier attempt has trained, and wait until the record holds it."""
    from lightning_modules.record import open_record  # noqa: PLC0415

    record = attempt.record = open_record(spec)
    try:
        trained = read_trained(spec)
        ranks.told(trained is not None)
        if trained is None:
            trained = _fit(spec, record, attempt, ranks)
            write_trained(spec.work_dir, trained)
        checkpoints = record.settled(trained.checkpoints, trained.uploaded, attempt.should_stop)
    finally:
        record.close()
    return TrainerResult(
        status="completed", checkpoints=checkpoints, metrics=trained.metrics, resources=trained.resources
    )


def _fit(spec: TrainerSpec, record: JobRecord, attempt: Attempt, ranks: Ranks) -> Trained:
    leave_out_unused(spec)
    # Seconds of imports: a spec that cannot be read must not wait for them.
    with importing():
        from lightning_modules.callbacks import Progress, Resources  # noqa: PLC0415
        from lightning_modules.job import prepare_job  # noqa: PLC0415

    quieten_libraries()
    resources = Resources(record)
    callbacks = [Progress(PROGRESS_SECONDS), resources]
    try:
        job = prepare_job(
            spec, record, callbacks, attempt.should_stop, before_weights=resources.begin, ranks=ranks
        )
        finished = job.run()
    finally:
        resources.tell()
    return Trained(
        job=job_of(spec),
        checkpoints=finished.checkpoints,
        uploaded=finished.uploaded,
        metrics=finished.metrics,
        resources=resources.summary(),
    )


def failure_file(rank: int) -> str:
    """Return the name of the file, in the job's folder, of a process's failure."""
    return f"failure-{rank}.json"


def write_result(path: Path, result: TrainerResult, attempt_id: str) -> None:
    """Write an attempt's result complete or not at all."""
    signed = result.model_copy(update={"attempt_id": attempt_id})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, signed.model_dump_json(indent=2))


if __name__ == "__main__":
    sys.exit(main())
