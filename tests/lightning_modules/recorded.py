"""What MLflow holds of a run, and what several suites record in one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel

from lightning_modules.record import JobRecord, open_record
from post_training.schemas.jobs import PostTrainingMetric
from post_training.schemas.record import ARTIFACT_RESUME, TAG_RESUME_STATE
from post_training.schemas.trainer import StoredState, TrainerSpec

EPOCH_0 = PostTrainingMetric(epoch=0, train_loss=1.5, validation_loss=2.0, perplexity=math.exp(2.0))


def of_epoch(epoch: int) -> PostTrainingMetric:
    """The same metrics, of another epoch."""
    return EPOCH_0.model_copy(update={"epoch": epoch})


def retried(spec: TrainerSpec, **changes: Any) -> TrainerSpec:
    """The spec of the second attempt."""
    return spec.model_copy(update={"attempt": 2, "begun": True, **changes})


def points(client: MlflowClient, run_id: str, key: str = "train_loss") -> list[tuple[int, float]]:
    """Step and value of each point of a metric, in MLflow's order."""
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def table_of(client: MlflowClient, run_id: str, name: str) -> dict[str, list[Any]]:
    """Read a table as MLflow does; it looks only at what the run's tag lists."""
    return dict(client.load_table("0", name, [run_id]).to_dict("list"))


def models(client: MlflowClient, run_id: str) -> list[LoggedModel]:
    """The run's logged models."""
    return list(client.search_logged_models(["0"], filter_string=f"source_run_id = '{run_id}'"))


def model_files(client: MlflowClient, model_id: str, below: str | None = None) -> list[str]:
    """The files that MLflow holds of a model, by path."""
    found: list[str] = []
    for file in client.list_logged_model_artifacts(model_id, below):
        found += model_files(client, model_id, file.path) if file.is_dir else [file.path]
    return found


def stored_state(client: MlflowClient, run_id: str) -> StoredState | None:
    """The state that the run announces."""
    text = client.get_run(run_id).data.tags.get(TAG_RESUME_STATE)
    return StoredState.model_validate_json(text) if text else None


def state_files(client: MlflowClient, run_id: str) -> list[str]:
    """The names of the files beside the announced state, itself included."""
    paths = [file.path for file in client.list_artifacts(run_id, ARTIFACT_RESUME)]
    return sorted(path.rpartition("/")[2] for path in paths)


def read_table(work_dir: Path, name: str) -> list[list[Any]]:
    """The rows of a table that a job has in its folder; none where it has made none."""
    file = work_dir / "tables" / name
    rows: list[list[Any]] = json.loads(file.read_text())["data"] if file.exists() else []
    return rows


def begun(spec: TrainerSpec, inputs: str = "x", *, here: str | None = None) -> JobRecord:
    """Open a spec's record and say what it trains, as a trainer does when it has read its data."""
    record = open_record(spec)
    record.begin(inputs, here=here, give_up=lambda: False)
    return record
