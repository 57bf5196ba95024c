"""What the service says of a job."""

from __future__ import annotations

import math
from datetime import datetime
from enum import Enum
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from post_training.schemas.base import LenientModel


def _null_unless_finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


FiniteOrNull = Annotated[float | None, AfterValidator(_null_unless_finite)]
"""A number; null where it is NaN or infinite, which JSON cannot say."""


class JobStatus(Enum):
    """State of a job, in the published client's words."""

    completed = "completed"
    in_progress = "in_progress"
    failed = "failed"
    scheduled = "scheduled"
    cancelled = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether no further change can come."""
        return self in (JobStatus.completed, JobStatus.failed, JobStatus.cancelled)


class PostTrainingMetric(LenientModel):
    """The four metrics of a checkpoint. Losses are mean nats per scored token."""

    epoch: int = Field(description="Epoch at whose end the checkpoint was taken, counted from 0.")
    train_loss: FiniteOrNull = Field(description="Mean loss over the epoch's scored training tokens.")
    validation_loss: FiniteOrNull = Field(description="Mean loss over the validation batches.")
    perplexity: FiniteOrNull = Field(description="exp(validation_loss).")


class Checkpoint(LenientModel):
    """One saved state of the trained weights."""

    identifier: str = Field(description="Name, unique within the deployment.")
    created_at: datetime = Field(description="When it was saved (UTC).")
    epoch: int = Field(description="Epoch at whose end it was taken, counted from 0.")
    post_training_job_id: str = Field(description="The job's job_uuid.")
    path: str = Field(
        description="MLflow model URI, ``models:/<model id>``; where none was uploaded, the copy's folder."
    )
    training_metrics: PostTrainingMetric | None = Field(default=None, description="Its four metrics.")


def checkpoint_identifier(job_uuid: str, epoch: int) -> str:
    """Name of a checkpoint: a job has one per epoch, and a job's id is unique."""
    return f"{job_uuid}-epoch-{epoch}"


class PostTrainingJob(LenientModel):
    """A job, by its id."""

    job_uuid: str


class ListPostTrainingJobsResponse(LenientModel):
    """All jobs that the caller may see, newest first."""

    data: list[PostTrainingJob]


class PostTrainingJobStatusResponse(LenientModel):
    """State of a job, its times (UTC), and what it has made so far."""

    job_uuid: str = Field(description="The job's id.")
    status: JobStatus = Field(description="Its state.")
    scheduled_at: datetime | None = Field(default=None, description="When it was asked for.")
    started_at: datetime | None = Field(default=None, description="When its newest attempt began.")
    completed_at: datetime | None = Field(default=None, description="When it ended, however it did.")
    resources_allocated: dict[str, Any] | None = Field(
        default=None,
        description="Of the newest attempt: device, dtype, peak memory in bytes, seconds, tokens. Of all"
        " attempts at the job, also while it runs: device_seconds, seconds times devices from reading the"
        " base model to the end of the fit, and job_tokens, the tokens as often as they were trained.",
    )
    checkpoints: list[Checkpoint] = Field(
        default_factory=list, description="What it has saved so far, oldest first."
    )
    error: str | None = Field(default=None, description="Why a failed job failed, in one sentence.")


class PostTrainingJobArtifactsResponse(LenientModel):
    """The checkpoints of a job, oldest first."""

    job_uuid: str
    checkpoints: list[Checkpoint] = Field(default_factory=list)


class ReconcileJobsResponse(LenientModel):
    """What a look at all open runs has found and done."""

    checked: int = Field(default=0, description="Open runs that were looked at.")
    mended: int = Field(default=0, description="Of them, those whose status was brought to the truth.")
    stopped: int = Field(default=0, description="Tasks of cancelled jobs that were still to be stopped.")
    failed: int = Field(default=0, description="Runs for which MLflow or Airflow did not answer.")
    discarded: int = Field(default=0, description="Runs of submits that were cut off, now deleted.")


class PostTrainingJobLogStream(LenientModel):
    """Lines of a job's training log, oldest first."""

    job_uuid: str
    log_lines: list[str]
    next_offset: int | None = Field(
        default=None, description="Offset of the page after this one; null where the log goes no further yet."
    )
