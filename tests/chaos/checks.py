"""What must hold of each job when all is over. Each check is a pure function: a sentence for each fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.chaos.client import ENDED
from tests.chaos.records import Series, Trained

OF_STATUS = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
OF_TASK_STATE = {"success": {"completed"}, "failed": {"failed", "cancelled"}, "skipped": {"cancelled"}}


@dataclass(frozen=True)
class Ended:
    """All that is known of a job at the end.

    :param status: the API's answer; its ``status`` was ``first_end`` when the job was first seen ended.
    :param mlflow: status of each run with the job's id, and whether that run is active.
    :param models: step and state of each of its logged models.
    :param trained: what it trained; None if it did not complete.
    :param reference: what the same request trains undisturbed.
    :param epochs: how many the request has.
    :param processes: of its trainer that still run.
    """

    job_uuid: str
    kind: str
    status: dict[str, Any]
    first_end: str
    cancel_accepted: bool
    task: dict[str, Any]
    mlflow: list[tuple[str, bool]]
    models: list[tuple[int, str]]
    trained: Trained | None
    reference: Trained
    epochs: int
    processes: int

    @property
    def completed(self) -> bool:
        """Whether the API says so."""
        return bool(self.status["status"] == "completed")


def ended_once(job: Ended) -> list[str]:
    """One active run; the API, MLflow and Airflow agree on an end, and it has not changed since."""
    status = job.status["status"]
    if len(job.mlflow) != 1 or not job.mlflow[0][1]:
        return [f"runs in MLflow: {job.mlflow}"]
    faults = []
    if status not in ENDED or job.first_end != status:
        faults.append(f"was {job.first_end}, is {status}")
    if job.mlflow[0][0] != OF_STATUS.get(status):
        faults.append(f"is {status} and {job.mlflow[0][0]} in MLflow")
    if status not in OF_TASK_STATE.get(job.task["state"], ()):
        faults.append(f"is {status} and its task {job.task['state']}")
    return faults


def right_status(job: Ended) -> list[str]:
    """A job that was cancelled is cancelled, and every other is completed."""
    expected = "cancelled" if job.cancel_accepted else "completed"
    status, error = job.status["status"], job.status.get("error")
    return [] if status == expected else [f"is {status} instead of {expected}: {error}"]


def same_weights(job: Ended) -> list[str]:
    """The weights of a job that nobody disturbed, bit by bit."""
    if job.trained is None or job.trained.weights == job.reference.weights:
        return []
    return ["weights differ from the undisturbed job's"]


def whole_metrics(job: Ended) -> list[str]:
    """The same points as an undisturbed job's: none missing, none twice, each of the same value."""
    return [] if job.trained is None else differences(job.trained.series, job.reference.series)


def whole_checkpoints(job: Ended) -> list[str]:
    """Each epoch's checkpoint once, ready, in the API and in MLflow."""
    if not job.completed:
        return []
    epochs = [checkpoint["epoch"] for checkpoint in job.status["checkpoints"]]
    faults = [] if epochs == list(range(job.epochs)) else [f"lists checkpoints of epochs {epochs}"]
    steps, states = Counter(step for step, _ in job.models), {state for _, state in job.models}
    if len(steps) != job.epochs or set(steps.values()) != {1} or states != {"READY"}:
        faults.append(f"has the models {sorted(job.models)}")
    return faults


def no_process(job: Ended) -> list[str]:
    """No trainer outlives its job."""
    return [f"{job.processes} of its trainers still run"] if job.processes else []


CHECKS: dict[str, Callable[[Ended], list[str]]] = {
    "ended once": ended_once,
    "status": right_status,
    "weights": same_weights,
    "metrics": whole_metrics,
    "checkpoints": whole_checkpoints,
    "no orphan": no_process,
}


def differences(found: Series, expected: Series) -> list[str]:
    """Return a sentence for each metric of which the points differ."""
    faults = []
    for key in sorted(found.keys() | expected.keys()):
        ours, theirs = found.get(key, []), expected.get(key, [])
        if ours != theirs:
            count = Counter(step for step, _ in ours)
            wanted = {step for step, _ in theirs}
            faults.append(
                f"{key}: {len(ours)} points for {len(theirs)}, missing {sorted(wanted - count.keys())[:5]},"
                f" twice {[step for step, times in count.items() if times > 1][:5]},"
                f" other {[(a, b) for a, b in zip(ours, theirs, strict=False) if a != b][:2]}"
            )
    return faults
