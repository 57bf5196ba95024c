"""A checkpoint's folder as a logged model of the job's MLflow run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric

from lightning_modules.record import now_ms
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric, checkpoint_identifier
from post_training.schemas.record import TAG_CHECKPOINT, TAG_JOB_UUID

MODEL_SCHEME = "models:/"


@dataclass(frozen=True)
class Point:
    """One value of a metric.

    :param time: milliseconds since the epoch (UTC); None takes time and value of the run's point at the same
        step, or is now.
    """

    key: str
    value: float
    time: int | None


@dataclass
class _Upload:
    """A model whose files are being uploaded, and those that are there."""

    model_id: str
    done: set[tuple[Path, int]] = field(default_factory=set)
    """Each with the time of its last change: a retry may export an epoch anew."""


class LoggedModels:
    """Publishes checkpoints of one run; one per epoch, however often it is asked.

    READY means whole: files and metrics are there before the status says so. An upload that an outage cut off
    goes on with the files that are missing when it is asked for again.
    """

    def __init__(self, client: MlflowClient, run_id: str, job_uuid: str) -> None:
        self._client = client
        self._run_id = run_id
        self._job_uuid = job_uuid
        self._uploads: dict[int, _Upload] = {}

    def publish(
        self, folder: Path, *, step: int, metrics: PostTrainingMetric, points: Sequence[Point]
    ) -> Checkpoint:
        """Upload the folder, or find that this epoch's checkpoint is already there.

        :param points: what is logged as the model's own metrics; finite values only.
        :raises Exception: whatever MLflow's client raises; no READY model is left by it.
        """
        model = self._begun(metrics.epoch) or self._take_over(metrics.epoch)
        if model is None:
            model = self._create(step, metrics)
        if not _is_ready(model):
            model = self._upload(model.model_id, folder, step, metrics.epoch, points)
        self._attach(model.model_id, step)
        self._uploads.pop(metrics.epoch, None)
        return self._checkpoint(model)

    def ready(self) -> dict[int, Checkpoint]:
        """Return the run's checkpoints by epoch.

        :raises Exception: whatever MLflow's client raises.
        """
        found = [self._checkpoint(model) for model in self._search() if _is_ready(model)]
        return {checkpoint.epoch: checkpoint for checkpoint in found}

    def delete(self, epoch: int) -> None:
        """Delete an epoch's checkpoint, if there is one.

        :raises Exception: whatever MLflow's client raises.
        """
        self._uploads.pop(epoch, None)
        for model in self._search(epoch):
            self._client.delete_logged_model(model.model_id)

    def _search(self, epoch: int | None = None) -> list[LoggedModel]:
        """Return the run's models, those of one epoch or all, of every page."""
        wanted = f"source_run_id = '{self._run_id}'"
        if epoch is not None:
            wanted += f" AND name = '{_model_name(epoch)}'"
        models: list[LoggedModel] = []
        token: str | None = None
        while True:
            page = self._client.search_logged_models(
                [self._experiment_id], filter_string=wanted, page_token=token
            )
            models.extend(model for model in page if TAG_CHECKPOINT in model.tags)
            token = page.token
            if not token:
                return models

    @cached_property
    def _experiment_id(self) -> str:
        return str(self._client.get_run(self._run_id).info.experiment_id)

    def _begun(self, epoch: int) -> LoggedModel | None:
        """Return the model of an upload that this process has begun, as MLflow knows it now."""
        upload = self._uploads.get(epoch)
        if upload is None:
            return None
        models = [model for model in self._search(epoch) if model.model_id == upload.model_id]
        if not models:  # somebody has deleted it meanwhile
            del self._uploads[epoch]
        return models[0] if models else None

    def _take_over(self, epoch: int) -> LoggedModel | None:
        """Return this epoch's READY model, and remove what killed attempts left unfinished."""
        ready = None
        for model in self._search(epoch):
            if _is_ready(model):
                ready = model
                continue
            if model.status.value == "PENDING":
                self._client.finalize_logged_model(model.model_id, "FAILED")
            self._client.delete_logged_model(model.model_id)
        return ready

    def _create(self, step: int, metrics: PostTrainingMetric) -> LoggedModel:
        model = self._client.create_logged_model(
            self._experiment_id,
            name=_model_name(metrics.epoch),
            source_run_id=self._run_id,
            tags={TAG_CHECKPOINT: metrics.model_dump_json(), TAG_JOB_UUID: self._job_uuid},
            params={"epoch": str(metrics.epoch), "step": str(step)},
        )
        self._uploads[metrics.epoch] = _Upload(model.model_id)
        return model

    def _upload(
        self, model_id: str, folder: Path, step: int, epoch: int, points: Sequence[Point]
    ) -> LoggedModel:
        upload = self._uploads[epoch]
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            version = (file, file.stat().st_mtime_ns)
            if version not in upload.done:
                below = file.parent.relative_to(folder).as_posix()
                self._client.log_model_artifact(model_id, str(file), None if below == "." else below)
                upload.done.add(version)
        self._log_points(model_id, step, points)
        return self._client.finalize_logged_model(model_id, "READY")

    def _log_points(self, model_id: str, step: int, points: Sequence[Point]) -> None:
        of_run = [point if point.time else self._in_run(point, step) for point in points]
        values = [Metric(p.key, p.value, p.time or now_ms(), step, model_id=model_id) for p in of_run]
        self._client.log_batch(self._run_id, metrics=values, synchronous=True)

    def _in_run(self, point: Point, step: int) -> Point:
        """Return the point as the run has it, from an attempt on another machine; as it is if it has none."""
        history = self._client.get_metric_history(self._run_id, point.key)
        found = next((metric for metric in history if metric.step == step), None)
        return Point(point.key, found.value, found.timestamp) if found else point

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


def _is_ready(model: LoggedModel) -> bool:
    return str(model.status.value) == "READY"
