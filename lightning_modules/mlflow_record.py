"""The job's record in its MLflow run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TypeVar

from mlflow import MlflowClient

from lightning_modules.delivery import MLflowDelivery
from lightning_modules.logged_models import MODEL_SCHEME, LoggedModels, Point
from lightning_modules.record import CLOSE_TIMEOUT, TABLES, LocalRecord, now_ms, require_files
from lightning_modules.sender import Sender
from lightning_modules.spool import Spool
from post_training.errors import RecordUnavailableError
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric
from post_training.schemas.record import METRIC_PERPLEXITY, METRIC_TRAIN_LOSS, METRIC_VALIDATION_LOSS
from post_training.schemas.trainer import TrackingTarget

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

RETRY_PAUSES = (1.0, 3.0, 9.0)
TABLES_SPOOL_FILE = "tables.jsonl"
METRIC_EPOCH_TRAIN_LOSS = f"{METRIC_TRAIN_LOSS}_epoch"
"""A model's own mean training loss. MLflow also shows a model's metrics as the run's, where
``train_loss`` is a series of single steps: the two must not mix."""


class MLflowRecord(LocalRecord):
    """One MLflow run, written to by its id; its status is left to whoever made it.

    :param close_timeout: seconds that ``close`` may take.
    :param pauses: seconds between the tries of an upload, one try more than pauses.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        *,
        job_uuid: str,
        spool: Spool,
        close_timeout: float = CLOSE_TIMEOUT,
        pauses: Sequence[float] = RETRY_PAUSES,
        known_steps: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(spool, job_uuid)
        self._recorded |= known_steps or {}
        self._client = client
        self._run_id = run_id
        self._models = LoggedModels(client, run_id, job_uuid)
        self._close_timeout = close_timeout
        self._pauses = pauses
        delivery = MLflowDelivery(client, run_id, spool.folder / TABLES)
        # A queue of their own: an artifact store that is down must not hold up the metrics.
        self._tables = Spool(spool.folder / TABLES_SPOOL_FILE, run_id)
        self._senders = [Sender(spool, delivery), Sender(self._tables, delivery)]
        for sender in self._senders:
            sender.start()

    def log_checkpoint(self, folder: Path, *, step: int, metrics: PostTrainingMetric) -> Checkpoint:
        """Upload the folder as a logged model of the run.

        :raises ValueError: if the folder holds no file.
        :raises RecordUnavailableError: after the last try; no READY model is left behind.
        """
        require_files(folder)
        points = self._model_points(metrics, step)
        try:
            return self._retry(
                lambda: self._models.publish(folder, step=step, metrics=metrics, points=points), self._pauses
            )
        except Exception as error:
            self._models.discard_unfinished(metrics.epoch)
            what = f"the checkpoint of epoch {metrics.epoch}"
            raise RecordUnavailableError(f"MLflow did not take {what}: {error}") from error

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write the table's file in the job's folder, and have it sent."""
        super().log_table(name, columns, rows)
        self._tables.append([{"kind": "table", "name": name}])

    def start_over(self) -> None:
        """Take every step as new, and delete the run's checkpoints.

        :raises RecordUnavailableError: if MLflow does not delete them.
        """
        super().start_over()
        try:
            self._retry(self._models.delete_all, self._pauses)
        except Exception as error:
            raise RecordUnavailableError(f"MLflow did not delete old checkpoints: {error}") from error

    def discard_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Delete the logged model, or warn after a second try that it could not be; or remove the tag."""
        if not checkpoint.path.startswith(MODEL_SCHEME):
            super().discard_checkpoint(checkpoint)
            return
        model_id = checkpoint.path.removeprefix(MODEL_SCHEME)
        try:
            self._retry(lambda: self._client.delete_logged_model(model_id), self._pauses[:1])
        except Exception as error:  # one checkpoint too many is not worth a job
            _log.warning("MLflow did not delete the checkpoint %s: %s", checkpoint.identifier, error)

    def log_artifact(self, path: Path, folder: str) -> None:
        """Upload the file, or warn after a second try that it could not be."""
        try:
            self._retry(lambda: self._client.log_artifact(self._run_id, str(path), folder), self._pauses[:1])
        except Exception as error:  # a log file is not worth a job
            _log.warning("MLflow did not take the file %s: %s", path, error)

    def close(self) -> None:
        """Send what waits; what could not be sent in time stays on disk for the next attempt."""
        deadline = monotonic() + self._close_timeout
        sent = [sender.close(max(0.0, deadline - monotonic())) for sender in self._senders]
        if not all(sent):
            _log.warning("Part of the record was not sent in %g s and is kept on disk", self._close_timeout)

    def _retry(self, call: Callable[[], _T], pauses: Sequence[float]) -> _T:
        for pause in pauses:
            try:
                return call()
            except Exception as error:  # MLflow and its HTTP client share no base class
                _log.warning("MLflow did not answer and is asked again in %g s: %s", pause, error)
                time.sleep(pause)
        return call()

    def _model_points(self, metrics: PostTrainingMetric, step: int) -> list[Point]:
        """Date the model's values like the run's own, where it has the same, so that none is doubled.

        Values that are not finite (None) are left out: MLflow stores a model's NaN as 0.
        """
        values = {
            METRIC_EPOCH_TRAIN_LOSS: metrics.train_loss,
            METRIC_VALIDATION_LOSS: metrics.validation_loss,
            METRIC_PERPLEXITY: metrics.perplexity,
        }
        now = now_ms()
        return [
            Point(key, value, self._spool.time_of(key, step, value) or now)
            for key, value in values.items()
            if value is not None
        ]


def open_mlflow_record(
    target: TrackingTarget, file: Path, job_uuid: str, *, retried: bool, timeout: float
) -> MLflowRecord:
    """Open the record of a run.

    :param file: the spool; a retry without one ran on another machine before, and asks MLflow
        what is recorded.
    :param timeout: seconds that the record's ``close`` may take.
    """
    client = MlflowClient(tracking_uri=target.tracking_uri)
    return MLflowRecord(
        client,
        target.run_id,
        job_uuid=job_uuid,
        known_steps=_known_steps(client, target.run_id) if retried and not file.exists() else None,
        spool=Spool(file, target.run_id),
        close_timeout=timeout,
    )


def _known_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Ask MLflow for the last step of each metric: an earlier attempt ran on another machine.

    Empty, with a warning, if it does not answer.
    """
    try:
        keys = client.get_run(run_id).data.metrics
        return {key: max(m.step for m in client.get_metric_history(run_id, key)) for key in keys}
    except Exception as error:
        _log.warning("MLflow did not say what an earlier attempt recorded; points may repeat: %s", error)
        return {}
