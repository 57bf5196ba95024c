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

WAITING = frozenset({None, "scheduled", "queued"})
WORKING = frozenset({"running", "deferred", "awaiting_input"})
_ENDED = {
    "success": JobStatus.completed,
    "failed": JobStatus.failed,
    "upstream_failed": JobStatus.failed,
    "skipped": JobStatus.cancelled,
    "removed": JobStatus.cancelled,
}


@dataclass(frozen=True)
class Evidence:
    """What MLflow and Airflow know of a job.

    :param mlflow_status: the run's status; None where there is no run yet.
    :param task_state: Airflow's task state; None is a task that was not scheduled yet.
    :param has_task: False where Airflow knows no such task any more.
    :param same_attempt: whether the attempt that wrote the record last is the task's newest.
    :param cancelled: whether somebody asked to stop the newest attempt, through us or in Airflow.
    """

    mlflow_status: str | None
    task_state: str | None
    has_task: bool = True
    same_attempt: bool = True
    cancelled: bool = False

    @property
    def task_lives(self) -> bool:
        """Whether the task may still do something."""
        return self.has_task and self.task_state not in _ENDED


@dataclass(frozen=True)
class Verdict:
    """A job's state, and what makes the two agree with it.

    :param mend: MLflow status that the record is to get; None: it is right.
    :param stop: whether the task is still to be stopped.
    """

    status: JobStatus
    mend: str | None = None
    stop: bool = False


def reconcile(evidence: Evidence) -> Verdict:
    """Decide a job's state from its record and its task.

    ===================  =======================  =========================================================
    task                 record                   job
    ===================  =======================  =========================================================
    cancelled, lives     any                      cancelled; the task is to be stopped
    waits                none, SCHEDULED          scheduled
    waits                RUNNING                  in progress: between two attempts
    waits                ended                    scheduled: it was cleared
    works                ended by this attempt    as recorded: the task is about to end
    works                anything else            in progress
    between two tries    any                      in progress
    ended                ended                    as recorded; cancelled if it was cleared and then stopped
    ended                open or none             cancelled if it was stopped, else as the task ended
    forgotten            ended                    as recorded
    forgotten            open or none             failed
    ===================  =======================  =========================================================

    A record is mended where it is open and the job has ended, where the job goes on in a record that says
    FAILED, and to KILLED; KILLED and FINISHED are never overwritten.
    """
    status = _status(evidence)
    recorded = evidence.mlflow_status
    wanted = TO_MLFLOW[status]
    is_open = recorded in ("SCHEDULED", "RUNNING")
    goes_on = recorded == "FAILED" and status is JobStatus.in_progress
    mend = wanted if recorded is not None and ((is_open and status.ended) or goes_on) else None
    about_to_end = recorded == "FINISHED" and evidence.same_attempt
    stop = evidence.cancelled and evidence.task_lives and not about_to_end
    return Verdict(status, mend, stop)


def stage_status(state: str | None, *, is_there: bool) -> str | None:
    """Decide how the run of a task that is no job ends in MLflow; None where the task may yet end it itself.

    :param state: Airflow's state of the task; of the DAG run, where the run is open as long as that.
    :param is_there: False where Airflow has it no more.
    """
    if not is_there:
        return "FAILED"
    if state not in _ENDED:
        return None
    return "FINISHED" if state in ("success", "skipped") else "FAILED"


def _status(evidence: Evidence) -> JobStatus:
    recorded = OF_MLFLOW[evidence.mlflow_status] if evidence.mlflow_status is not None else None
    has_ended = recorded is not None and recorded.ended
    if not evidence.has_task:
        return recorded if recorded is not None and has_ended else JobStatus.failed
    if not evidence.task_lives:
        if recorded is not None and has_ended and (evidence.same_attempt or not evidence.cancelled):
            return recorded
        return JobStatus.cancelled if evidence.cancelled else _ENDED[str(evidence.task_state)]
    return _status_of_the_living(evidence, recorded)


def _status_of_the_living(evidence: Evidence, recorded: JobStatus | None) -> JobStatus:
    """Decide where the task waits, works, or is between two tries."""
    if recorded is JobStatus.completed and evidence.same_attempt and evidence.task_state in WORKING:
        return recorded
    if evidence.cancelled:
        return JobStatus.cancelled
    if evidence.task_state in WAITING:
        return JobStatus.in_progress if recorded is JobStatus.in_progress else JobStatus.scheduled
    if recorded is not None and recorded.ended and evidence.same_attempt and evidence.task_state in WORKING:
        return recorded
    return JobStatus.in_progress
