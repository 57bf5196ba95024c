"""One pure function that says what a job's state is when MLflow and Airflow disagree."""

from __future__ import annotations

from dataclasses import dataclass

from post_training.schemas.jobs import JobStatus

OF_MLFLOW: dict[str, JobStatus] = {
    "SCHEDULED": JobStatus.scheduled,
    "RUNNING": JobStatus.in_progress,
    "FINISHED": JobStatus.completed,
    "FAILED": JobStatus.failed,
    "KILLED": JobStatus.cancelled,
}
TO_MLFLOW = {status: name for name, status in OF_MLFLOW.items()}

_WAITING = frozenset({None, "scheduled", "queued"})
_WORKING = frozenset(
    {"running", "deferred", "awaiting_input", "restarting", "up_for_retry", "up_for_reschedule"}
)
_ENDED = {
    "success": JobStatus.completed,
    "failed": JobStatus.failed,
    "upstream_failed": JobStatus.failed,
    "skipped": JobStatus.cancelled,
    "removed": JobStatus.cancelled,
}


@dataclass(frozen=True)
class Verdict:
    """The job's state, and the MLflow status that the record should be mended to (None: it is right)."""

    status: JobStatus
    mend: str | None = None


def reconcile(mlflow_status: str | None, task_state: str | None, *, has_task: bool = True) -> Verdict:
    """Decide a job's state from its record and its task.

    A task that waits or works is the newer truth: the run was cleared, or is retried. A record that has
    ended stands when the task has ended too. A record that has not ended follows a task that has.

    :param mlflow_status: the run's status; None where there is no run yet.
    :param task_state: Airflow's task state; None is a task that was not scheduled yet.
    :param has_task: False where Airflow knows no such task any more.
    """
    recorded = OF_MLFLOW[mlflow_status] if mlflow_status is not None else JobStatus.scheduled
    if not has_task:
        return Verdict(recorded) if recorded.ended else Verdict(JobStatus.failed, "FAILED")
    if task_state in _WAITING:
        return Verdict(JobStatus.scheduled)
    if task_state in _WORKING:
        return Verdict(JobStatus.in_progress)
    if recorded.ended:
        return Verdict(recorded)
    ended = _ENDED[str(task_state)]
    return Verdict(ended, TO_MLFLOW[ended] if mlflow_status is not None else None)
