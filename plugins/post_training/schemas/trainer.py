"""What the operator hands to a trainer process, and what it gets back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from post_training.schemas.base import LenientModel
from post_training.schemas.jobs import Checkpoint, FiniteOrNull
from post_training.schemas.requests import AnyTrainingRequest

RESULT_FILE = "result.json"
SPEC_FILE = "spec.json"
METRICS_FILE = "metrics.jsonl"
"""Below the job's folder: what the trainer records, one event a line (``lightning_modules.spool``)."""

RESUME_FOLDER = "resume"
"""Below the job's folder: the state that a retry goes on from."""

BASE_FOLDER = "base"
"""Below the job's folder: the base model, where it comes from MLflow."""


CACHE_FOLDER = "cache"
"""Below the deployment's folder, or the job's: what jobs make once and share."""


UPLOADED = "checkpoint in MLflow: "
"""Stands in a trainer's line of output before the URI of a checkpoint that has arrived."""


RESULT_LINE = "result of the attempt: "
"""Stands in a Ray job's output before the JSON of its result: nobody reads its disk."""


class TrackingTarget(LenientModel):
    """The MLflow run that a trainer writes to. Credentials travel in the environment."""

    tracking_uri: str
    run_id: str


class StoredState(LenientModel):
    """The newest state that MLflow holds of a training that has not ended."""

    path: str = Field(description="The file, below the run's artifacts.")
    step: int = Field(description="Optimizer steps done.")
    inputs: str = Field(description="SHA-256 of what the job was trained from: request, model and data.")
    sha256: str = Field(description="Of the file.")


class TrainerSpec(LenientModel):
    """One attempt at one job. The trainer trusts it: it was validated before."""

    request: AnyTrainingRequest = Field(description="Told apart by their fields: each forbids the other's.")
    model: str = Field(
        description="Resolved model to start from: an absolute path, a hub id, or an MLflow URI."
    )
    model_roots: tuple[Path, ...] = Field(
        default=(), description="Where the base model that an adapter names may lie, if it is a path."
    )
    train_data: str = Field(description="Resolved training data: an absolute path or a URI.")
    validation_data: str | None = Field(description="The same for validation; null is the training data.")
    checkpoint_dir: Path | None = Field(description="The job's own folder for copies of checkpoints.")
    work_dir: Path = Field(description="The job's folder; shared by all attempts of the job.")
    attempt: int = Field(ge=1, description="Airflow's try number.")
    attempt_id: str = Field(
        default="", description="Greater than that of every attempt before; empty is never superseded."
    )
    begun: bool = Field(
        default=False,
        description="Whether the run may hold something of an attempt before: also of a DAG run that was"
        " deleted and triggered again.",
    )
    keep_state_in_mlflow: bool = Field(
        default=True, description="Whether a retry on another machine may go on from what MLflow holds."
    )
    max_data_bytes: int = Field(default=2**32, description="Largest data set that is fetched.")
    cache_dir: Path | None = Field(
        default=None,
        description="Where tokenized data, reference log-probabilities and unpacked models are kept for other"
        " jobs; null is the job's folder.",
    )
    max_cache_bytes: int = Field(
        default=20 * 2**30, description="What that folder may hold; what was used longest ago is removed."
    )
    node_patience: float = Field(
        default=300.0, description="Seconds for which nodes are waited for that a Ray cluster has not."
    )
    tracking: TrackingTarget | None = Field(description="Null trains without a record.")


class ProcessResult(LenientModel):
    """What a process that is no trainer leaves: written once, by rename, as its last act."""

    status: Literal["completed", "failed"]
    error: str | None = Field(default=None, description="Why it failed, in one sentence.")
    permanent: bool = Field(default=False, description="Whether another attempt would fail the same way.")


class TrainerResult(LenientModel):
    """Written once, by rename, as the trainer's last act."""

    attempt_id: str = Field(default="", description="The spec's.")
    status: Literal["completed", "failed", "inputs_changed"]
    error: str | None = Field(default=None, description="Why it is not completed, in one sentence.")
    permanent: bool = Field(default=False, description="Whether another attempt would fail the same way.")
    diverged: bool = Field(
        default=False,
        description="Whether its loss is no longer a finite number: its state is no use.",
    )
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    metrics: dict[str, FiniteOrNull] = Field(default_factory=dict, description="Last value of each metric.")
    resources: dict[str, Any] = Field(default_factory=dict)
