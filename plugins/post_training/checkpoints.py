"""A job's checkpoints, as its MLflow run holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from post_training.schemas import record as names
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric, checkpoint_identifier

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel


def recorded_checkpoints(tags: Mapping[str, str], models: Iterable[LoggedModel]) -> list[Checkpoint]:
    """Return the finished checkpoints by epoch: models, and copies of epochs that have none.

    :param tags: of the run.
    :param models: the run's logged models.
    """
    job_uuid = tags.get(names.TAG_JOB_UUID, "")
    uploaded = [_of_model(model, job_uuid) for model in models if _is_finished(model)]
    epochs = {checkpoint.epoch for checkpoint in uploaded}
    copies = [copy for copy in _copies(tags) if copy.epoch not in epochs]
    return sorted([*uploaded, *copies], key=lambda checkpoint: checkpoint.epoch)


def _is_finished(model: LoggedModel) -> bool:
    return names.TAG_CHECKPOINT in model.tags and str(model.status) == "READY"


def _of_model(model: LoggedModel, job_uuid: str) -> Checkpoint:
    metrics = PostTrainingMetric.model_validate_json(model.tags[names.TAG_CHECKPOINT])
    return Checkpoint(
        identifier=checkpoint_identifier(job_uuid, metrics.epoch),
        created_at=datetime.fromtimestamp(model.creation_timestamp / 1000, UTC),
        epoch=metrics.epoch,
        post_training_job_id=job_uuid,
        path=f"models:/{model.model_id}",
        training_metrics=metrics,
    )


def _copies(tags: Mapping[str, str]) -> Iterator[Checkpoint]:
    """Yield the checkpoints that the trainer noted in the run instead of uploading them."""
    for key, value in tags.items():
        if key.startswith(names.TAG_CHECKPOINT_COPY_PREFIX):
            yield Checkpoint.model_validate_json(value)
