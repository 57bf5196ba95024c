"""What the page shows of jobs. Its endpoints change with it: other clients use the published ones."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from post_training.schemas.base import LenientModel, StrictModel
from post_training.schemas.jobs import Checkpoint, FiniteOrNull, JobStatus

ADAPTER_NAMES = {
    (False, False): "LoRA",
    (True, False): "DoRA",
    (False, True): "QLoRA",
    (True, True): "QDoRA",
}
"""What adapters are called, by ``use_dora`` and ``quantize_base``."""

FULL_FINE_TUNING = "full fine-tuning"
"""What supervised fine-tuning without adapters and quantization is called."""


class JobRow(LenientModel):
    """One job of the list. What MLflow alone knows is null while it does not answer."""

    job_uuid: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1
    status: JobStatus
    method: str | None = None
    algorithm: str | None = Field(default=None, description="Null where the request is not known.")
    model: str | None = Field(default=None, description="Null where the request names none, or is not known.")
    attempt: int = 0
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    progress: FiniteOrNull = Field(default=None, description="Share of the optimizer steps that are done.")
    seconds_left: FiniteOrNull = None
    train_loss: FiniteOrNull = None
    validation_loss: FiniteOrNull = None
    sparkline: list[float] = Field(default_factory=list, description="The training loss, a few points.")


class JobsPage(LenientModel):
    """One page of the list, newest job first."""

    jobs: list[JobRow]
    total: int = Field(description="Jobs that the filter lets through.")
    may_submit: bool
    notice: str | None = Field(default=None, description="What is missing in the answer, in one sentence.")


class ShownCheckpoint(Checkpoint):
    """A checkpoint and its page in MLflow."""

    mlflow_url: str | None = None


class JobView(JobRow):
    """All that the page of one job shows, but for its curves and its log."""

    error: str | None = None
    warning: str | None = None
    resources: dict[str, Any] | None = None
    metrics: dict[str, FiniteOrNull] = Field(default_factory=dict, description="The newest value of each.")
    params: dict[str, Any] = Field(
        default_factory=dict, description="The request's set fields, by path, and what they came to."
    )
    checkpoints: list[ShownCheckpoint] = Field(default_factory=list)
    mlflow_url: str | None = None
    may_cancel: bool = False
    may_retry: bool = False
    retried: list[str | tuple[str, int]] = Field(
        default_factory=list, description="The tasks that a retry clears, as Airflow's API takes them."
    )
    blocked: bool = Field(default=False, description="Whether a task that failed before it must be cleared.")
    may_clone: bool = False
    may_read_logs: bool = False


class JobCurves(LenientModel):
    """A job's metrics by optimizer step: of each the steps and the values."""

    job_uuid: str
    metrics: dict[str, tuple[list[int], list[float]]]


class Curves(LenientModel):
    """The curves of several jobs, in the order in which they were asked for."""

    jobs: list[JobCurves]


class FormField(LenientModel):
    """One field of the form that submits."""

    path: str
    section: str
    # ``schema`` is a method of pydantic's models.
    json_schema: dict[str, Any]
    value: Any = None
    required: bool
    types: list[str] = Field(default_factory=list, description="Types of its group that it belongs to.")
    chosen_by: str = Field(default="", description="Path of the field that holds the group's type.")


class Form(LenientModel):
    """The form of one training method."""

    method: str
    title: str
    fields: list[FormField]


class FormSubmit(StrictModel):
    """A filled form: what is null is not said."""

    method: str
    job_uuid: str
    fields: dict[str, Any]
