"""The MLflow run of a task's job, over all attempts at it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from post_training.errors import RecordUnavailableError, TrainerError
from post_training.job_ids import TaskKey, job_uuid_of
from post_training.operators.links import MLflowRunLink
from post_training.record import identity_tags, new_run
from post_training.schemas import record as names
from post_training.schemas.requests import AnyTrainingRequest
from post_training.tracking import JobRun, Tracking

logger = logging.getLogger(__name__)


@dataclass
class TaskRecord:
    """Finds or makes the run, leads to it from Airflow, and writes how the attempt ended.

    :param tracking: the tracking server.
    :param key: the task.
    :param ti: the running task instance.
    :param submitted_run_id: the run that was made at submit, from the DAG run's conf.
    """

    tracking: Tracking
    key: TaskKey
    ti: Any
    submitted_run_id: Any = None
    run: JobRun | None = None

    @property
    def url(self) -> str | None:
        """The address of the run's page, once there is a run."""
        if self.run is None:
            return None
        return self.tracking.server.run_url(self.run.experiment_id, self.run.run_id)

    def open(self, request: AnyTrainingRequest) -> tuple[JobRun, bool]:
        """Set the job's run to RUNNING, made anew if what it holds is another training.

        :return: the run, and whether an earlier attempt's state may go on in it.
        :raises TrainerError: if this attempt was cancelled before it began.
        """
        run = self._existing()
        if run is not None and run.tags.get(names.TAG_CANCELLED_ATTEMPT) == str(self.ti.try_number):
            raise TrainerError("The job was cancelled before it began.")
        continues = run is None or not _is_another_training(run, request)
        if run is not None and not continues:
            logger.info("MLflow run %s stays as it is: this is another training", run.run_id)
            self.tracking.set_tags(run.run_id, {names.TAG_JOB_UUID: f"{request.job_uuid} (superseded)"})
            run = None
        self.run = run or self.tracking.create_run(**new_run(request, self.key))
        self._note()
        self.tracking.set_status(self.run.run_id, "RUNNING")
        return self.run, continues

    def refuse(self, method: str, error: str) -> None:
        """Record a request that is not even valid, so that it too has a run that says why."""
        try:
            self.run = (
                self.run
                or self._existing()
                or self.tracking.create_run(
                    name=job_uuid_of(self.key),
                    experiment=None,
                    tags={**identity_tags(self.key), names.TAG_METHOD: method},
                    params={},
                    request={},  # what was given is in the task's rendered fields; it may hold anything
                )
            )
            self._note()
        except RecordUnavailableError as unavailable:
            logger.warning("The refusal could not be recorded: %s", unavailable)
        self.conclude("FAILED", error)

    def conclude(self, status: str, error: str | None = None) -> None:
        """Write how the attempt ended; the task's own outcome does not hang on it.

        A job that was cancelled meanwhile stays so, however its trainer ended.
        """
        if self.run is None:
            return
        try:
            current = self.tracking.get(self.run.run_id)
            if current is None or current.status != "KILLED":
                self.tracking.set_status(self.run.run_id, status, error=error)
        except RecordUnavailableError as unavailable:
            logger.warning("MLflow run %s is not set to %s: %s", self.run.run_id, status, unavailable)

    def _existing(self) -> JobRun | None:
        """Return the run of this very task: ids are made of names, and two tasks' names may add up to one."""
        run_id = self.submitted_run_id
        submitted = self.tracking.get(run_id) if isinstance(run_id, str) else None
        for run in (submitted, self.tracking.find(job_uuid_of(self.key))):
            if run is not None and identity_tags(self.key).items() <= run.tags.items():
                return run
        return None

    def _note(self) -> None:
        """Let task and run lead to each other."""
        assert self.run is not None  # noqa: S101
        # Airflow itself stores the link only when the task ends.
        self.ti.xcom_push(key=MLflowRunLink().xcom_key, value=self.url)
        tags = {names.TAG_ATTEMPT: str(self.ti.try_number), names.TAG_AIRFLOW_URL: self.ti.log_url}
        self.tracking.set_tags(self.run.run_id, tags)
        logger.info("MLflow run %s: %s", self.run.run_id, self.url)


def _is_another_training(run: JobRun, request: AnyTrainingRequest) -> bool:
    """Whether the task was cleared after its job had completed, or asks for something else by now.

    What such a run holds is the record of what was trained then; only an attempt at the same may go on.
    """
    recorded = run.tags.get(names.TAG_PAYLOAD_HASH)
    return run.status == "FINISHED" or (recorded is not None and recorded != request.payload_hash())
