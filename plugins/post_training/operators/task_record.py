"""The MLflow run of a task's job, over all attempts at it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from post_training.datasets import PINNED
from post_training.errors import RecordUnavailableError, SupersededError
from post_training.job_ids import TaskKey, job_uuid_of
from post_training.operators.links import MLflowRunLink
from post_training.operators.patience import PATIENCE_SECONDS, persist
from post_training.operators.worker import PermanentFailureError
from post_training.record import identity_tags, new_run
from post_training.schemas import record as names
from post_training.schemas.requests import AnyTrainingRequest
from post_training.tracking import OPEN, SUPERSEDED, JobRun, Tracking, let_go, run_of_task

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Opened:
    """A job's run at the start of an attempt.

    :param finished: whether an earlier attempt had completed the job, and only Airflow did not learn of it.
    """

    run: JobRun
    finished: bool = False


@dataclass
class TaskRecord:
    """Finds or makes the run, leads to it from Airflow, and writes how the attempt ended.

    MLflow is waited for; an attempt that a newer one has replaced writes nothing.

    :param tracking: the tracking server.
    :param key: the task.
    :param ti: the running task instance.
    :param submitted_run_id: the run that was made at submit, from the DAG run's conf.
    :param parent_run_id: the run below which a new one is shown.
    :param give_up: asked while MLflow is waited for.
    :param patience: seconds for which it is waited for.
    :ivar run: the job's run, once it was found or made.
    """

    tracking: Tracking
    key: TaskKey
    ti: Any
    submitted_run_id: Any = None
    parent_run_id: str | None = None
    give_up: Callable[[], bool] = lambda: False
    patience: float = PATIENCE_SECONDS
    run: JobRun | None = None
    _before: JobRun | None = None  # the run as this attempt met it

    @property
    def url(self) -> str | None:
        """The address of the run's page, once there is a run."""
        if self.run is None:
            return None
        return self.tracking.server.run_url(self.run.experiment_id, self.run.run_id)

    @property
    def attempt_id(self) -> str:
        """Airflow's id of this attempt, a UUID of version 7: a later attempt's is greater."""
        return str(self.ti.id)

    def open(self, request: AnyTrainingRequest) -> Opened:
        """Set the job's run to RUNNING, made anew if what it holds is another training.

        :raises PermanentFailureError: if this attempt was cancelled before it began.
        :raises SupersededError: if a newer attempt has begun.
        :raises RecordUnavailableError: if MLflow does not answer in time.
        """
        return self.persist(lambda: self._open(request))

    def _open(self, request: AnyTrainingRequest) -> Opened:
        run = self.existing()
        if run is None:
            return self._begin(self.tracking.create_run(**self._new_run(request)))
        self._check(run)
        if self._was_finished(run, request):
            self.run = run
            return Opened(run, finished=True)
        if self._before is None or self._before.run_id != run.run_id:
            self._before = run
        self._end_superseded_half(run)
        if is_another_training(run, request):
            reason = "The task was cleared, or asks for something else by now."
            run = self._supersede(run, self._new_run(request), reason)
        return self._begin(run)

    def _new_run(self, request: AnyTrainingRequest, pins: Mapping[str, str] | None = None) -> dict[str, Any]:
        parent = {names.TAG_PARENT_RUN: self.parent_run_id} if self.parent_run_id is not None else {}
        return new_run(request, self.key, {**(pins or {}), **parent})

    def plan(self, request: AnyTrainingRequest, pins: Mapping[str, str]) -> JobRun:
        """Return the run in which the job's task will find what a task before it has done, RUNNING.

        It is made anew if what it holds is another training.

        :param pins: versions of registered data sets that a new one reads.
        :raises RecordUnavailableError: if MLflow does not answer; it may then be called again.
        """
        run, new = self.existing(), self._new_run(request, pins)
        if run is None:
            run = self.tracking.create_run(**new)
        elif is_another_training(run, request):
            self._before = run
            run = self._supersede(run, new, "The job begins anew, or asks for something else by now.")
        self.run = run
        self.tracking.set_status(run.run_id, "RUNNING")
        return run

    def _begin(self, run: JobRun) -> Opened:
        """Make a run this attempt's.

        Its status comes before the attempt's id: with that the end of the attempt before would be this one's.
        After the id it is looked whether an older attempt has left the run for another meanwhile; that one
        looks for the id after it has made the other.
        """
        self.run = run
        self._set_status("RUNNING")
        self._note()
        now = self.existing()
        if now is not None and now.run_id != run.run_id:
            if now.tags.get(names.TAG_SUPERSEDES) == run.run_id:
                self._retire(run, now)
            raise RecordUnavailableError(f"MLflow run {run.run_id} was left for {now.run_id} meanwhile")
        self._check(now)
        return Opened(run)

    def renew(self, request: AnyTrainingRequest, reason: str) -> Opened:
        """Leave the run to what earlier attempts trained, and open another.

        :param reason: why it is another training from here on.
        :raises PermanentFailureError: if this attempt was cancelled meanwhile.
        :raises SupersededError: if a newer attempt has begun.
        :raises RecordUnavailableError: if MLflow does not answer in time.
        """
        assert self.run is not None  # noqa: S101
        run = self.run
        return self.persist(lambda: self._renew(run, request, reason))

    def _renew(self, run: JobRun, request: AnyTrainingRequest, reason: str) -> Opened:
        now = self.tracking.get(run.run_id)
        self._check(now)
        if now is None:  # somebody has deleted it
            return self._begin(self.tracking.create_run(**self._new_run(request)))
        pins = {tag: now.tags[tag] for tag in PINNED if tag in now.tags}
        return self._begin(self._supersede(now, self._new_run(request, pins), reason))

    def _supersede(self, run: JobRun, new: Mapping[str, Any], reason: str) -> JobRun:
        """End a run with what it holds, and return the one that is the job's from here on.

        That one comes first, and is found by every later attempt: nothing is lost if it is cut off.

        :param new: what ``create_run`` makes it of.
        :raises SupersededError: if a newer attempt has begun in the old one meanwhile.
        :raises PermanentFailureError: if this attempt was cancelled meanwhile.
        """
        successor = self.tracking.successor(run.run_id)
        if successor is None:
            tags = {**new["tags"], names.TAG_SUPERSEDES: run.run_id}
            successor = self.tracking.create_run(**{**new, "tags": tags})
            try:
                self._check(self.tracking.get(run.run_id))
            except (SupersededError, PermanentFailureError):
                with suppress(RecordUnavailableError):
                    self.tracking.discard(successor.run_id)
                raise
        self.run = successor
        self._retire(run, successor, reason)
        return successor

    def _retire(
        self, run: JobRun, successor: JobRun, reason: str = "Another run of the job supersedes it."
    ) -> None:
        """End a run that another supersedes; one that had ended before this attempt gets its end back."""
        job_uuid = job_uuid_of(self.key)
        self.tracking.set_tags(run.run_id, {names.TAG_JOB_UUID: f"{job_uuid}{SUPERSEDED}"})
        before = self._before if self._before is not None and self._before.run_id == run.run_id else run
        if before.status in OPEN:
            self.tracking.set_status(run.run_id, "FAILED", error=reason)
        elif before.status != run.status:
            error, ended_at = before.tags.get(names.TAG_ERROR), before.ended_at
            self.tracking.set_status(run.run_id, before.status, error=error, ended_at=ended_at)
        now = self.tracking.get(run.run_id)
        if now is not None and self._is_cancelled(now):  # by somebody who found it as the job's
            cancelled = {names.TAG_CANCELLED_ATTEMPT: now.tags[names.TAG_CANCELLED_ATTEMPT]}
            self.tracking.set_tags(successor.run_id, cancelled)
        try:
            self.tracking.forget_state(run.run_id)
        except RecordUnavailableError as unavailable:  # only its space is lost
            logger.warning("The state in MLflow run %s could not be deleted: %s", run.run_id, unavailable)
        logger.info("MLflow run %s ends with what it holds: %s", run.run_id, reason)

    def _end_superseded_half(self, run: JobRun) -> None:
        """Retire the run that this one supersedes, where an attempt was cut off before it had."""
        superseded = run.tags.get(names.TAG_SUPERSEDES)
        if superseded is not None and names.TAG_ATTEMPT not in run.tags:
            left = self.tracking.get(superseded)
            self._check(left)
            if left is not None:
                self._retire(left, run)

    def _check(self, run: JobRun | None) -> None:
        """Refuse to begin an attempt that was cancelled, or is no longer the newest."""
        if run is None:
            return
        if run.tags.get(names.TAG_ATTEMPT_ID, "") > self.attempt_id:
            raise SupersededError("A newer attempt at this job runs.")
        if self._is_cancelled(run):
            raise PermanentFailureError("The job was cancelled before it began.")

    def is_cancelled(self) -> bool:
        """Whether somebody asked to stop this attempt; unknown is no."""
        try:
            run = self.persist(self._own_run)
        except RecordUnavailableError:
            return False
        return run is not None and self._is_cancelled(run)

    def _is_cancelled(self, run: JobRun) -> bool:
        """Whether this attempt was cancelled, or a later one, which a clear makes before this one ends."""
        return run.tags.get(names.TAG_CANCELLED_ATTEMPT, "") >= self.attempt_id

    def _was_finished(self, run: JobRun, request: AnyTrainingRequest) -> bool:
        """Whether this is a retry of what has been done.

        Who clears the task raises its limit of tries; the first try of a DAG run is of one that was triggered
        anew under its id.
        """
        return (
            run.completed
            and self.ti.try_number > 1
            and run.tags.get(names.TAG_MAX_TRIES) == str(self.ti.max_tries)
            and run.tags.get(names.TAG_PAYLOAD_HASH) == request.payload_hash()
        )

    def refuse(self, method: str, error: str) -> None:
        """Record a request that is not even valid, so that it too has a run that says why."""
        try:
            self.run = self.persist(lambda: self._run_of_a_refusal(method))
            self.persist(self._note)
        except (RecordUnavailableError, SupersededError, PermanentFailureError) as unwritten:
            logger.warning("The refusal is not recorded: %s", unwritten)
        self.conclude("FAILED", error)

    def _run_of_a_refusal(self, method: str) -> JobRun:
        if self.run is not None:
            return self.run
        new: dict[str, Any] = {
            "name": job_uuid_of(self.key),
            "experiment": None,
            "tags": {**identity_tags(self.key), names.TAG_METHOD: method},
            "params": {},
            "request": {},  # what was given is in the task's rendered fields; it may hold anything
        }
        run = self.existing()
        if run is None:
            return self.tracking.create_run(**new)
        self._check(run)
        if run.completed:
            return self._supersede(run, new, "The task was cleared, and what it asks for by now is refused.")
        return run

    def fail(self, error: str, *, permanent: bool = False) -> None:
        """Write that the attempt failed; the run is open until the last attempt has.

        :param permanent: whether Airflow is told not to try again.
        """
        if permanent or self.ti.try_number > self.ti.max_tries:
            self.conclude("FAILED", error)
            return
        self._write(lambda: self._tag_own_run({names.TAG_ERROR: error}))

    def conclude(self, status: str, error: str | None = None) -> None:
        """Write how the job ended; the task's own outcome does not hang on it.

        A job that was cancelled meanwhile stays so, however its trainer ended. What cannot be written is
        mended from Airflow's state, by whoever reads the job next.
        """
        self._write(lambda: self._conclude(status, error))

    def _conclude(self, status: str, error: str | None) -> None:
        if status == "FINISHED":
            self._tag_own_run({names.TAG_MAX_TRIES: str(self.ti.max_tries)})
        current = self._own_run()
        if current is not None and not self._is_cancelled(current):
            self._set_status(status, error)
            let_go(self.tracking, current, status)

    def forget_state(self) -> None:
        """Delete what MLflow keeps for a retry, when none is to come; not a newer attempt's."""
        self._write(self._forget_own_state)

    def _forget_own_state(self) -> None:
        run = self._own_run()
        if run is not None:
            self.tracking.forget_state(run.run_id)

    def add_file(self, path: Path, folder: str) -> None:
        """Upload a file into a folder of the run's artifacts, or log that it could not be."""
        self._write(
            lambda: self.tracking.add_file(self.run.run_id, path, folder) if self.run is not None else None
        )

    def _set_status(self, status: str, error: str | None = None) -> None:
        """Write a status; where the job is cancelled in the same moment, that is what stays."""
        assert self.run is not None  # noqa: S101
        self.tracking.set_status(self.run.run_id, status, error=error)
        written = self.tracking.get(self.run.run_id)
        if written is not None and self._is_cancelled(written) and written.status != "KILLED":
            self.tracking.set_status(self.run.run_id, "KILLED")

    def _own_run(self) -> JobRun | None:
        """Return the run as it is now; None where it is gone or a newer attempt's."""
        run = self.tracking.get(self.run.run_id) if self.run is not None else None
        return run if run is not None and run.tags.get(names.TAG_ATTEMPT_ID, "") <= self.attempt_id else None

    def _tag_own_run(self, tags: dict[str, str]) -> None:
        run = self._own_run()
        if run is not None:
            self.tracking.set_tags(run.run_id, tags)

    def _write(self, call: Callable[[], None]) -> None:
        """Make a call that nothing hangs on."""
        try:
            self.persist(call)
        except RecordUnavailableError as unavailable:
            logger.warning("MLflow's record of this job is left as it is: %s", unavailable)

    def persist(self, call: Callable[[], _T]) -> _T:
        """Call until MLflow answers or the time is over.

        :raises RecordUnavailableError: if it does not.
        """
        return persist(call, self.give_up, self.patience)

    def existing(self) -> JobRun | None:
        """Return the job's run, or None; the one for which it is being left, if it is."""
        run = run_of_task(self.tracking, self.key, self.submitted_run_id)
        return run and (self.tracking.successor(run.run_id) or run)

    def _note(self) -> None:
        """Let task and run lead to each other."""
        assert self.run is not None  # noqa: S101
        # Airflow itself stores the link only when the task ends.
        self.ti.xcom_push(key=MLflowRunLink().xcom_key, value=self.url)
        tags = {
            names.TAG_ATTEMPT: str(self.ti.try_number),
            names.TAG_ATTEMPT_ID: self.attempt_id,
            names.TAG_AIRFLOW_URL: self.ti.log_url,
        }
        self.tracking.set_tags(self.run.run_id, tags)
        logger.info("MLflow run %s: %s", self.run.run_id, self.url)


def is_another_training(run: JobRun, request: AnyTrainingRequest) -> bool:
    """Whether the task was cleared after its job had completed, or asks for something else by now.

    What such a run holds is the record of what was trained then; only an attempt at the same may go on.
    """
    recorded = run.tags.get(names.TAG_PAYLOAD_HASH)
    return run.completed or (recorded is not None and recorded != request.payload_hash())
