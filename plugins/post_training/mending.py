"""Lets MLflow and Airflow say the same of each job: on every read, and for all open runs at once.

Of tasks that are no jobs it ends the runs that nobody else will.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from post_training.airflow_runs import JobTask, Progress
from post_training.job_ids import TaskKey
from post_training.reconcile import OF_MLFLOW, WORKING, Evidence, Verdict, reconcile, stage_status
from post_training.record import identity_tags, task_key
from post_training.schemas import record as names
from post_training.schemas.jobs import JobStatus, ReconcileJobsResponse
from post_training.tracking import OPEN, JobRun, Tracking, let_go, run_of_task

logger = logging.getLogger(__name__)

SUBMIT_TIME = timedelta(minutes=10)
"""A run without a task that is younger may be one whose submit is under way."""

KILLED_TIME = timedelta(hours=1)
"""For so long the task of a cancelled job is looked for: its cancel may have been cut off half way."""

END_TIME = timedelta(seconds=30)
"""Airflow fails a task before its process knows; the process has up to two heartbeats to end."""

NO_RESULT = "The Airflow task ended without a result; its log says more."
DELETED = "The DAG run was deleted from Airflow before it had ended."


class Tasks(Protocol):
    """The jobs' tasks in Airflow, as ``airflow_runs.AirflowRuns`` has them."""

    def find(self, job_uuid: str) -> JobTask | None:
        """Return the job's task."""

    def find_task(self, key: TaskKey) -> JobTask | None:
        """Return a task that may be a job's."""

    def progress(self, key: TaskKey, *, of_run: bool = False) -> Progress | None:
        """Return how far a task has come, or its whole run."""

    def was_stopped(self, task: JobTask) -> bool:
        """Whether somebody stopped the task, or its run."""

    def cancel(self, key: TaskKey, user_name: str) -> None:
        """Stop a task."""


class Mender:
    """Decides what a job's state is, and mends the record or stops the task where they do not agree.

    :param tasks: the jobs' tasks in Airflow.
    :param tracking: makes the access to the jobs' runs in MLflow.
    """

    def __init__(self, tasks: Tasks, tracking: Callable[[], Tracking]) -> None:
        self._tasks = tasks
        self._tracking = tracking

    def mended(self, task: JobTask | None, run: JobRun | None) -> Verdict:
        """Return a job's state, both sides brought to it.

        :raises RecordUnavailableError: if one of them does not answer.
        """
        if task is None and run is not None and _is_young(run):
            return Verdict(OF_MLFLOW[run.status])
        evidence = self.evidence(task, run)
        verdict = reconcile(evidence)
        cancelled = verdict.status is JobStatus.cancelled  # whatever its process may still write
        if verdict.mend is not None and task is not None and not cancelled and _ended_just_now(task):
            return Verdict(JobStatus.in_progress)
        if verdict.mend is not None and run is not None:
            self._mend(task, run, verdict)
        if verdict.stop and task is not None:
            self._stop(task)
        return verdict

    def _mend(self, task: JobTask | None, run: JobRun, verdict: Verdict) -> None:
        """Write the record's status, unless one of the two has changed since they were looked at."""
        now = self._tracking().get(run.run_id)
        same_task = task is None or _identity(self._tasks.find_task(task.key)) == _identity(task)
        same_run = now is not None and _identity_of(now) == _identity_of(run)
        if now is not None and same_run and same_task:
            assert verdict.mend is not None  # noqa: S101
            let_go(self._tracking(), now, verdict.mend)
            self._tracking().set_status(run.run_id, verdict.mend, error=failure(verdict, now))

    def _stop(self, task: JobTask) -> None:
        """Stop the task of a job that is cancelled already; the next read tries again."""
        try:
            self._tasks.cancel(task.key, "post-training")
        except Exception as error:
            logger.warning("The task of the cancelled job %s could not be stopped: %s", task.job_uuid, error)

    def evidence(self, task: JobTask | None, run: JobRun | None) -> Evidence:
        """Gather what both know; Airflow's log of its users' actions is asked only where it matters."""
        evidence = Evidence(
            mlflow_status=_status_of(run, task),
            task_state=task.state if task is not None else None,
            has_task=task is not None,
        )
        if task is None:
            return evidence
        tags, attempt = run.tags if run is not None else {}, task.attempt_id
        evidence = replace(
            evidence,
            same_attempt=tags.get(names.TAG_ATTEMPT_ID) == attempt,
            cancelled=tags.get(names.TAG_CANCELLED_ATTEMPT) == attempt,
        )
        settled = evidence.cancelled or (run is not None and run.status not in OPEN and evidence.same_attempt)
        if evidence.task_lives or settled:
            return evidence
        return replace(evidence, cancelled=self._tasks.was_stopped(task))

    def reconcile_all(self, may_mend: Callable[[str], bool]) -> ReconcileJobsResponse:
        """Mend every open run, also of tasks that are no jobs, and delete those that no job came to use.

        :param may_mend: whether the caller may change runs of a DAG.
        :raises RecordUnavailableError: if MLflow or Airflow does not answer.
        """
        counts = ReconcileJobsResponse()
        for run in self._tracking().unsettled_runs(datetime.now(UTC) - KILLED_TIME):
            if may_mend(run.tags.get(names.TAG_DAG_ID, "")):
                counts.checked += 1
                try:
                    self._reconcile(run, counts)
                except Exception as error:  # one run must not hold up the others, whatever ails it
                    counts.failed += 1
                    logger.warning("MLflow run %s could not be mended: %s", run.run_id, error)
        return counts

    def _reconcile(self, run: JobRun, counts: ReconcileJobsResponse) -> None:
        if names.TAG_STAGE in run.tags:
            counts.mended += self._end_stage(run)
            return
        task = self._task_of(run)
        if is_unused(run, task):
            if not _is_young(run):
                self._tracking().discard(run.run_id)
                counts.discarded += 1
            return
        verdict = self.mended(task, run)
        counts.mended += verdict.mend is not None
        counts.stopped += verdict.stop
        if verdict.mend is not None:
            logger.info("MLflow run %s was %s and is %s", run.run_id, run.status, verdict.mend)

    def _end_stage(self, run: JobRun) -> bool:
        """End the run of a task that is no job, where the task cannot do so any more; return whether it was.

        A trial that its task has left open was cut off, however the task ended; a cleared task goes on.
        """
        progress = self._progress(run)
        status = stage_status(progress.state if progress is not None else None, is_there=progress is not None)
        if status is None or (progress is not None and _ended_just_now(progress)):
            return False
        now = self._tracking().get(run.run_id)
        if now is None or now.status not in OPEN or self._progress(run) != progress:
            return False
        if names.TAG_TRIAL in run.tags:
            status = "FAILED"
        reason = now.tags.get(names.TAG_ERROR, NO_RESULT if progress is not None else DELETED)
        self._tracking().set_status(run.run_id, status, error=reason if status == "FAILED" else None)
        logger.info("MLflow run %s was left %s and is %s", run.run_id, now.status, status)
        return True

    def _progress(self, run: JobRun) -> Progress | None:
        """Return how far that has come which ends the run: its task, or for a retraining's the DAG run."""
        key = task_key(run.tags)
        return self._tasks.progress(key, of_run=names.TAG_NIGHT in run.tags) if key is not None else None

    def _task_of(self, run: JobRun) -> JobTask | None:
        """Return the task whose record this run is, None where it has another one or is gone."""
        key = task_key(run.tags)
        task = self._tasks.find_task(key) if key is not None else None
        is_the_jobs = key is not None and identity_tags(key).items() <= run.tags.items()
        if task is None or (is_the_jobs and task.conf.get(names.CONF_MLFLOW_RUN) == run.run_id):
            return task
        own = run_of_task(self._tracking(), task.key, task.conf.get(names.CONF_MLFLOW_RUN))
        return task if own is not None and own.run_id == run.run_id else None


def _identity(task: JobTask | None) -> tuple[str, str | None] | None:
    return (task.attempt_id, task.state) if task is not None else None


def _identity_of(run: JobRun) -> tuple[str, str | None]:
    """Return what tells a run that was mended, or left for another one, since it was read."""
    return run.status, run.tags.get(names.TAG_JOB_UUID)


def failure(verdict: Verdict, run: JobRun | None) -> str | None:
    """Return why a failed job failed, None for another."""
    if verdict.status is not JobStatus.failed:
        return None
    recorded = run.tags.get(names.TAG_ERROR) if run is not None else None
    return recorded or NO_RESULT


def is_unused(run: JobRun, task: JobTask | None) -> bool:
    """Whether a run was made by a submit that was cut off, and the job, if there is one, has another."""
    if names.TAG_JOB_UUID not in run.tags:
        return True
    begun = names.TAG_ATTEMPT in run.tags or names.TAG_SUPERSEDES in run.tags
    submitted = task.conf.get(names.CONF_MLFLOW_RUN) if task is not None else None
    return not begun and submitted != run.run_id and run.status == "SCHEDULED"


def _status_of(run: JobRun | None, task: JobTask | None) -> str | None:
    """Return the run's status; one that neither its task nor a cancel has written does not end the job.

    A notebook that opens a run writes FINISHED when it leaves it.
    """
    if run is None or task is None:
        return run.status if run is not None else None
    works = task.state in WORKING and run.tags.get(names.TAG_ATTEMPT_ID) == task.attempt_id
    finished = run.status == "FINISHED" and not run.completed and task.state != "success"
    cancelled = run.tags.get(names.TAG_CANCELLED_ATTEMPT, "") >= task.attempt_id
    killed = run.status == "KILLED" and not cancelled and works
    return "RUNNING" if finished or killed else run.status


def _is_young(run: JobRun) -> bool:
    return datetime.now(UTC) - run.created_at < SUBMIT_TIME


def _ended_just_now(task: JobTask | Progress) -> bool:
    """Whether the task's process may still be ending, and about to write how into the record."""
    return task.ended_at is not None and datetime.now(UTC) - task.ended_at < END_TIME
