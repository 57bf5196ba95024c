"""A checkpoint's folder as a logged model of the job's MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric

from lightning_modules.record import checkpoint_identifier
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric
from post_training.schemas.record import TAG_CHECKPOINT, TAG_JOB_UUID

_log = logging.getLogger(__name__)

MODEL_SCHEME = "models:/"


@dataclass(frozen=True)
class Point:
    """One value of a metric, at a time in milliseconds since the epoch (UTC)."""

    key: str
    value: float
    time: int


class LoggedModels:
    """Publishes checkpoints of one run; one per epoch, however often it is asked.

    READY means whole: files and metrics are there before the status says so.
    """

    def __init__(self, client: MlflowClient, run_id: str, job_uuid: str) -> None:
        self._client = client
        self._run_id = run_id
        self._job_uuid = job_uuid

    def publish(
        self, folder: Path, *, step: int, metrics: PostTrainingMetric, points: Sequence[Point]
    ) -> Checkpoint:
        """Upload the folder, or find that this epoch's checkpoint is already there.

        :param points: what is logged as the model's own metrics; finite values only.
        :raises Exception: whatever MLflow's client raises; no READY model is left by it.
        """
        ready = self._take_over(metrics.epoch)
        model = ready or self._upload(folder, step, metrics, points)
        self._attach(model.model_id, step)
        return self._checkpoint(model)

    def delete_all(self) -> None:
        """Delete every checkpoint of the run.

        :raises Exception: whatever MLflow's client raises.
        """
        run_filter = f"source_run_id = '{self._run_id}'"
        while models := self._client.search_logged_models([self._experiment_id], filter_string=run_filter):
            for model in models:
                self._client.delete_logged_model(model.model_id)

    def discard_unfinished(self, epoch: int) -> None:
        """Remove this epoch's half-made models as far as MLflow answers; never raises."""
        try:
            self._take_over(epoch)
        except Exception as error:  # it stays PENDING, which no reader takes for a checkpoint
            _log.warning("An unfinished checkpoint of epoch %d could not be removed: %s", epoch, error)

    @cached_property
    def _experiment_id(self) -> str:
        return str(self._client.get_run(self._run_id).info.experiment_id)

    def _take_over(self, epoch: int) -> LoggedModel | None:
        """Return this epoch's READY model, and remove what killed attempts left unfinished."""
        models = self._client.search_logged_models(
            [self._experiment_id],
            filter_string=f"source_run_id = '{self._run_id}' AND name = '{_model_name(epoch)}'",
        )
        ready = None
        for model in models:
            if model.status.value == "READY":
                ready = model
                continue
            self._client.finalize_logged_model(model.model_id, "FAILED")
            self._client.delete_logged_model(model.model_id)
        return ready

    def _upload(
        self, folder: Path, step: int, metrics: PostTrainingMetric, points: Sequence[Point]
    ) -> LoggedModel:
        model = self._client.create_logged_model(
            self._experiment_id,
            name=_model_name(metrics.epoch),
            source_run_id=self._run_id,
            tags={TAG_CHECKPOINT: metrics.model_dump_json(), TAG_JOB_UUID: self._job_uuid},
            params={"epoch": str(metrics.epoch), "step": str(step)},
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._log_points(model.model_id, step, points)
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _log_points(self, model_id: str, step: int, points: Sequence[Point]) -> None:
        values = [Metric(p.key, p.value, p.time, step, model_id=model_id) for p in points]
        self._client.log_batch(self._run_id, metrics=values, synchronous=True)

    def _attach(self, model_id: str, step: int) -> None:
        """List the model among the run's outputs, once: MLflow would list it twice."""
        outputs = self._client.get_run(self._run_id).outputs
        attached = {output.model_id for output in outputs.model_outputs} if outputs else set()
        if model_id not in attached:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model_id, step)])

    def _checkpoint(self, model: LoggedModel) -> Checkpoint:
        metrics = PostTrainingMetric.model_validate_json(model.tags[TAG_CHECKPOINT])
        return Checkpoint(
            identifier=checkpoint_identifier(self._job_uuid, metrics.epoch),
            created_at=datetime.fromtimestamp(model.creation_timestamp / 1000, UTC),
            epoch=metrics.epoch,
            post_training_job_id=self._job_uuid,
            path=f"{MODEL_SCHEME}{model.model_id}",
            training_metrics=metrics,
        )


def _model_name(epoch: int) -> str:
    return f"epoch-{epoch}"
