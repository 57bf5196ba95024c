"""The six methods of PostTraining over Airflow and MLflow; every collaborator is passed in."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any, Protocol

from post_training.airflow_runs import JobFilter, JobTask, RunExistsError
from post_training.datasets import Resolver
from post_training.errors import (
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    RecordUnavailableError,
)
from post_training.job_ids import TaskKey, candidate_keys, request_dag
from post_training.keyed_locks import KeyedLocks
from post_training.mending import Mender, Tasks, failure, is_unused
from post_training.operators.request import with_checked_defaults
from post_training.reconcile import Evidence
from post_training.record import new_run
from post_training.schemas import record as names
from post_training.schemas.flat import flatten
from post_training.schemas.jobs import (
    JobStatus,
    ListPostTrainingJobsResponse,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobStatusResponse,
    ReconcileJobsResponse,
)
from post_training.schemas.requests import AnyTrainingRequest
from post_training.tracking import JobRun, Tracking, run_of_task

logger = logging.getLogger(__name__)


class Access(Protocol):
    """What the caller may do, by DAG."""

    user_name: str

    def may_read(self, dag_id: str) -> bool:
        """Whether the caller may see the DAG's runs."""

    def may_read_logs(self, dag_id: str) -> bool:
        """Whether the caller may read the logs of the DAG's tasks."""

    def may_trigger(self, dag_id: str) -> bool:
        """Whether the caller may start runs of the DAG."""

    def may_cancel(self, dag_id: str) -> bool:
        """Whether the caller may change runs of the DAG."""

    def may_retry(self, dag_id: str) -> bool:
        """Whether the caller may clear tasks of the DAG."""


class Runs(Tasks, Protocol):
    """The jobs' tasks in Airflow; ``airflow_runs.AirflowRuns`` says what each method does."""

    def trigger(self, dag_id: str, run_id: str, conf: dict[str, Any], user_name: str | None) -> None:
        """Start a DAG run."""

    def job_uuids(self, dag_ids: Collection[str]) -> list[str]:
        """Return the ids of the jobs of these DAGs, newest first."""

    def page(self, wanted: JobFilter, offset: int, limit: int) -> tuple[list[JobTask], int]:
        """Return some of the jobs that a filter finds, and how many it finds."""

    def dag_ids(self, *, prefix_of: str | None = None) -> set[str]:
        """Return the DAGs that have jobs, or could have one of this id."""


class JobService:
    """Submit, list, status, cancel and artifacts of jobs.

    :param runs: the jobs' tasks in Airflow.
    :param tracking: makes the access to the jobs' runs in MLflow; called anew for each use, so that a
        connection that was corrected takes effect.
    :param resolver: checks the names of data sets and models.
    :param runtime_defaults: what the deployment sets where a request's runtime block does not; called anew
        for each use, too.
    """

    def __init__(
        self,
        runs: Runs,
        tracking: Callable[[], Tracking],
        resolver: Resolver,
        runtime_defaults: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._runs = runs
        self._runtime_defaults = runtime_defaults
        self._tracking = tracking
        self._resolver = resolver
        self._mender = Mender(runs, tracking)
        self._submitting = KeyedLocks()

    def submit(self, request: AnyTrainingRequest, access: Access) -> PostTrainingJob:
        """Start a job, or find the one that the same request started before.

        :raises ForbiddenError: if the caller may not trigger the DAG of such requests.
        :raises InvalidRequestError: if the request names what cannot be had.
        :raises JobConflictError: if another request has this job_uuid.
        :raises RecordUnavailableError: if MLflow or Airflow does not answer; nothing is left then.
        """
        dag_id = request_dag(request.method, search=request.search is not None)
        if not access.may_trigger(dag_id):
            raise ForbiddenError(f"{access.user_name} may not start runs of the DAG {dag_id!r}")
        with self._submitting.hold(request.job_uuid):
            self._submit(request, dag_id, access)
        return PostTrainingJob(job_uuid=request.job_uuid)

    def _submit(self, request: AnyTrainingRequest, dag_id: str, access: Access) -> None:
        conf = flatten(request)
        if self._is_known(request.job_uuid, dag_id, conf, access):
            return
        self._refuse_taken_names(request.job_uuid, access)
        with_checked_defaults(request, self._runtime_defaults())
        self._resolver.check(request)
        key = TaskKey(dag_id, request.job_uuid, names.REQUEST_TASK_ID)
        run = self._tracking().create_run(**new_run(request, key, self._resolver.pins(request)))
        try:
            self._runs.trigger(
                dag_id, request.job_uuid, {**conf, names.CONF_MLFLOW_RUN: run.run_id}, access.user_name
            )
        except RunExistsError:  # another api-server was faster
            self._discard(run)
            if not self._is_known(request.job_uuid, dag_id, conf, access):
                raise RecordUnavailableError(f"job {request.job_uuid!r} is being started") from None
        except Exception:
            self._discard(run)
            raise

    def _is_known(self, job_uuid: str, dag_id: str, conf: dict[str, Any], access: Access) -> bool:
        known = self._runs.find(job_uuid)
        if known is None:
            return False
        submitted = {key: value for key, value in known.conf.items() if key != names.CONF_MLFLOW_RUN}
        if known.key.dag_id != dag_id or submitted != conf:
            if not access.may_read(known.key.dag_id):
                raise _unavailable_id()
            raise JobConflictError(f"job_uuid {job_uuid!r} belongs to a job with another request")
        return True

    def _refuse_taken_names(self, job_uuid: str, access: Access) -> None:
        """Refuse an id that a task of another DAG has, or will have."""
        taken = next(candidate_keys(job_uuid, self._runs.dag_ids(prefix_of=job_uuid)), None)
        if taken is not None:
            if not access.may_read(taken.dag_id):
                raise _unavailable_id()
            raise InvalidRequestError.of(
                "job_uuid",
                f"must not start with {taken.dag_id!r} and a dot: jobs of that DAG's tasks are named so",
            )

    def _discard(self, run: JobRun) -> None:
        try:
            self._tracking().discard(run.run_id)
        except RecordUnavailableError:
            logger.warning("MLflow run %s was made for no job and could not be deleted", run.run_id)

    def list(self, access: Access) -> ListPostTrainingJobsResponse:
        """Return all jobs that the caller may see, newest first. Asks Airflow alone."""
        readable = {dag_id for dag_id in self._runs.dag_ids() if access.may_read(dag_id)}
        ids = self._runs.job_uuids(readable) if readable else []
        return ListPostTrainingJobsResponse(data=[PostTrainingJob(job_uuid=job_uuid) for job_uuid in ids])

    def status(self, job_uuid: str, access: Access) -> PostTrainingJobStatusResponse:
        """Return a job's state, and mend its record where Airflow knows better.

        :raises JobNotFoundError: if there is no such job, or the caller may not see it.
        """
        task, run = self.locate(job_uuid, access)
        verdict = self._mender.mended(task, run)
        ended_at = run.ended_at if run is not None else None
        return PostTrainingJobStatusResponse(
            job_uuid=job_uuid,
            status=verdict.status,
            scheduled_at=_scheduled_at(task, run),
            started_at=task.started_at if task is not None else None,
            completed_at=(ended_at or (task.ended_at if task is not None else None))
            if verdict.status.ended
            else None,
            resources_allocated=_resources(run),
            checkpoints=self._tracking().checkpoints(run) if run is not None else [],
            error=failure(verdict, run),
        )

    def artifacts(self, job_uuid: str, access: Access) -> PostTrainingJobArtifactsResponse:
        """Return a job's checkpoints, oldest first.

        :raises JobNotFoundError: if there is no such job, or the caller may not see it.
        """
        _, run = self.locate(job_uuid, access)
        checkpoints = self._tracking().checkpoints(run) if run is not None else []
        return PostTrainingJobArtifactsResponse(job_uuid=job_uuid, checkpoints=checkpoints)

    def cancel(self, job_uuid: str, access: Access) -> None:
        """Stop a job; its checkpoints so far are kept.

        :raises JobNotFoundError: if there is no such job, or the caller may not see it.
        :raises ForbiddenError: if the caller may see but not stop it.
        :raises JobConflictError: if it has ended.
        """
        try:
            task, run = self.locate(job_uuid, access)
        except RecordUnavailableError:  # Airflow alone can stop a task; its audit log mends the record later
            task, run = self._runs.find(job_uuid), None
            if task is None or not access.may_read(task.key.dag_id):
                raise
        if task is not None and not access.may_cancel(task.key.dag_id):
            raise ForbiddenError(f"{access.user_name} may not stop runs of the DAG {task.key.dag_id!r}")
        status = self._mender.mended(task, run).status
        ended = status.ended and status is not JobStatus.cancelled
        if task is None or ended or not Evidence(None, task.state).task_lives:
            how = f": {status.value}" if status.ended else ""
            raise JobConflictError(f"job {job_uuid!r} has ended{how}")
        if run is not None:
            self._kill(run, task)
        try:
            self._runs.cancel(task.key, access.user_name)
        except JobConflictError:  # it has ended since: as a cancelled job, if its record says so
            if run is None:
                raise

    def _kill(self, run: JobRun, task: JobTask) -> None:
        """Write that the job is cancelled: with the tag it is, whatever fails and however its task ends.

        What was completed before the task was cleared stays so.
        """
        tracking = self._tracking()
        tracking.set_tags(run.run_id, {names.TAG_CANCELLED_ATTEMPT: task.attempt_id})
        if not run.completed:
            tracking.set_status(run.run_id, "KILLED")

    def reconcile(self, access: Access) -> ReconcileJobsResponse:
        """Bring MLflow's open runs and Airflow's tasks to agree, as far as the caller may change them.

        :raises ForbiddenError: if the caller may stop no job at all.
        :raises RecordUnavailableError: if MLflow or Airflow does not answer.
        """
        if not any(map(access.may_cancel, self._runs.dag_ids())):
            raise ForbiddenError(f"{access.user_name} may not stop jobs")
        return self._mender.reconcile_all(access.may_cancel)

    def locate(self, job_uuid: str, access: Access) -> tuple[JobTask | None, JobRun | None]:
        """Find a job's task and run; a job that Airflow has forgotten is found by its run's tags.

        :raises JobNotFoundError: if there is no such job, or the caller may not see it.
        """
        task = self._runs.find(job_uuid)
        run = self._run_of(job_uuid, task)
        dag_id = task.key.dag_id if task is not None else (run.tags.get(names.TAG_DAG_ID) if run else None)
        if dag_id is None or not access.may_read(dag_id):
            raise JobNotFoundError(job_uuid)
        return task, run

    def _run_of(self, job_uuid: str, task: JobTask | None) -> JobRun | None:
        if task is not None:
            return run_of_task(self._tracking(), task.key, task.conf.get(names.CONF_MLFLOW_RUN))
        run = self._tracking().find(job_uuid)
        return None if run is None or is_unused(run, None) else run


def _unavailable_id() -> InvalidRequestError:
    """Say the same of a job and of a DAG whose existence the caller may not learn."""
    return InvalidRequestError.of("job_uuid", "is not available: choose another")


def _scheduled_at(task: JobTask | None, run: JobRun | None) -> datetime | None:
    if task is not None:
        return task.scheduled_at
    return run.created_at if run is not None else None


def _resources(run: JobRun | None) -> dict[str, Any] | None:
    text = run.tags.get(names.TAG_RESOURCES) if run is not None else None
    return json.loads(text) if text else None
