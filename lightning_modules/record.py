"""Where a trainer writes what it does: the job's MLflow run, or the job's folder alone."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from lightning_modules.process import importing
from lightning_modules.spool import Spool
from lightning_modules.tables import write_table
from post_training.errors import InputsChangedError
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric, checkpoint_identifier
from post_training.schemas.record import TAG_CHECKPOINT_COPY_PREFIX
from post_training.schemas.trainer import METRICS_FILE, TrainerSpec

_log = logging.getLogger(__name__)

SPOOL_FILE = METRICS_FILE

CLOSE_TIMEOUT = 60.0
MAX_PARAM_CHARACTERS = 6000
MAX_TAG_CHARACTERS = 8000

HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "120"}
"""Retries, and seconds until an answer begins: to a large file the server answers when it has stored it. By
MLflow's own limits one call may wait for many minutes."""


class JobRecord(Protocol):
    """What a trainer tells of itself. Only ``begin``, ``restore_state`` and ``settled`` wait for it."""

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt has taken over: nothing more is recorded then."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values of one optimizer step; NaN and infinities are recorded as NaN."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings, nested ones by dotted names."""

    def set_tag(self, key: str, value: str) -> None:
        """Record a tag, replacing its older value."""

    def left(self, key: str) -> list[str]:
        """Return what earlier attempts left of a tag, here and elsewhere; asked after ``begin``."""

    def log_dataset(
        self, *, name: str, digest: str, source: str, rows: int, context: Literal["training", "validation"]
    ) -> None:
        """Record a data set. MLflow knows a run's data set by name and digest: the first context stays."""

    def log_checkpoint(self, folder: Path, *, step: int, metrics: PostTrainingMetric) -> Checkpoint:
        """Record the checkpoint of an epoch, once; its folder must stay until it is settled or discarded.

        :raises ValueError: if the folder holds no file.
        """

    def settled(
        self, checkpoints: Sequence[Checkpoint], uploaded: Collection[int], give_up: Callable[[], bool]
    ) -> list[Checkpoint]:
        """Wait until the checkpoints have arrived, and return them as the record holds them.

        :param uploaded: epochs that were given to ``log_checkpoint``.
        :param give_up: asked while waiting.
        :raises RecordUnavailableError: if some have not arrived after a long time.
        """

    def log_state(self, file: Path, *, step: int, inputs: str, must: bool) -> None:
        """Record the state that a retry goes on from.

        :param step: optimizer steps done.
        :param inputs: digest of what is trained.
        :param must: whether it may not be passed over, however near the one before is.
        """

    def restore_state(
        self, file: Path, *, step: int | None, inputs: str, give_up: Callable[[], bool]
    ) -> int | None:
        """Replace the state in a file by a newer one of the record, and return its step; None has none.

        :param step: of the state that is there; None where there is none.
        :param inputs: digest of what is trained; a state of something else is left alone.
        :raises RecordUnavailableError: if training cannot begin without an answer.
        """

    def note_checkpoint(self, folder: Path, *, metrics: PostTrainingMetric) -> Checkpoint:
        """Record an epoch's checkpoint that stays where it is; a later one of the same epoch replaces it.

        :raises ValueError: if the folder holds no file.
        """

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Record a whole table, replacing what was recorded under its name.

        :param name: a file's name that ends in ``.json``.
        """

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return a metric's finite values with their steps, in their order, of all attempts."""

    def log_figure(self, file: Path) -> None:
        """Record a picture, replacing what was recorded under its name.

        :param file: in the folder ``figures`` of the job's.
        """

    def begin(self, inputs: str, *, here: str | None, give_up: Callable[[], bool]) -> None:
        """Say what is trained; nothing else may be recorded before.

        :param inputs: digest of request, model and data.
        :param here: the same of what earlier attempts left on this machine; None is nothing.
        :param give_up: asked while waiting.
        :raises InputsChangedError: if earlier attempts trained something else, here or elsewhere.
        :raises RecordUnavailableError: if training cannot begin without the record's answer.
        """

    def discard_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint from the record."""

    def close(self) -> None:
        """Send what waits, for a bounded time."""


class LocalRecord:
    """The job's folder alone: the spool is the record, and checkpoints stay where they are."""

    def __init__(self, spool: Spool, job_uuid: str) -> None:
        self._spool = spool
        self._job_uuid = job_uuid
        self._recorded = spool.last_steps()
        self._warned: set[str] = set()

    @property
    def superseded(self) -> bool:
        """Never: one folder is locked by one attempt."""
        return False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Spool the values, but for steps that an earlier attempt has recorded already."""
        self._warn_of_non_finite(metrics, step)
        values = {
            key: float(value) if math.isfinite(value) else None
            for key, value in metrics.items()
            if step > self._recorded.get(key, -1)
        }
        if values:
            self._spool.append([{"kind": "metrics", "time": now_ms(), "step": step, "values": values}])

    def log_params(self, params: Mapping[str, object]) -> None:
        """Spool the settings."""
        self._spool.append({"kind": "param", "key": k, "value": v} for k, v in flatten(params).items())

    def set_tag(self, key: str, value: str) -> None:
        """Spool the tag, cut to the length that MLflow keeps."""
        self._spool.append([{"kind": "tag", "key": key, "value": value[:MAX_TAG_CHARACTERS]}])

    def left(self, key: str) -> list[str]:
        """Return what the spool holds of a tag."""
        value = self._spool.last_tag(key)
        return [] if value is None else [value]

    def log_dataset(
        self, *, name: str, digest: str, source: str, rows: int, context: Literal["training", "validation"]
    ) -> None:
        """Spool the data set."""
        dataset = {"name": name, "digest": digest, "source": source, "rows": rows, "context": context}
        self._spool.append([{"kind": "dataset", **dataset}])

    def log_checkpoint(self, folder: Path, *, step: int, metrics: PostTrainingMetric) -> Checkpoint:
        """Describe the folder; its path is the checkpoint's.

        :raises ValueError: if the folder holds no file.
        """
        return describe_checkpoint(self._job_uuid, folder, metrics)

    def settled(
        self, checkpoints: Sequence[Checkpoint], uploaded: Collection[int], give_up: Callable[[], bool]
    ) -> list[Checkpoint]:
        """Return the checkpoints."""
        return list(checkpoints)

    def log_state(self, file: Path, *, step: int, inputs: str, must: bool) -> None:
        """Do nothing: the file is in the job's folder."""

    def restore_state(
        self, file: Path, *, step: int | None, inputs: str, give_up: Callable[[], bool]
    ) -> int | None:
        """Find nothing: there is no other state than the folder's."""
        return None

    def note_checkpoint(self, folder: Path, *, metrics: PostTrainingMetric) -> Checkpoint:
        """Spool the folder's description as a tag of the run.

        :raises ValueError: if the folder holds no file.
        """
        checkpoint = describe_checkpoint(self._job_uuid, folder, metrics)
        self.set_tag(f"{TAG_CHECKPOINT_COPY_PREFIX}{checkpoint.epoch}", checkpoint.model_dump_json())
        return checkpoint

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write the table's file in the job's folder."""
        write_table(self._spool.folder, name, columns, rows)

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return what the spool holds of a metric."""
        return sorted(self._spool.points(key).items())

    def log_figure(self, file: Path) -> None:
        """Do nothing: the picture is in the job's folder."""

    def begin(self, inputs: str, *, here: str | None, give_up: Callable[[], bool]) -> None:
        """Refuse to go on where something else was trained.

        :raises InputsChangedError: if earlier attempts have.
        """
        if here not in (None, inputs):
            raise InputsChangedError(
                "The data, the model or the defaults are no longer what the attempts before trained from."
            )

    def discard_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Remove the checkpoint's tag; whoever made the folder removes it."""
        self._spool.append([{"kind": "untag", "key": f"{TAG_CHECKPOINT_COPY_PREFIX}{checkpoint.epoch}"}])

    def close(self) -> None:
        """Do nothing: every line is on disk."""

    def _warn_of_non_finite(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            if not math.isfinite(value) and key not in self._warned:
                self._warned.add(key)
                _log.warning("%s is %s at step %d; it is recorded as NaN", key, value, step)


def open_record(spec: TrainerSpec, *, close_timeout: float = CLOSE_TIMEOUT) -> JobRecord:
    """Open the record of the job's current attempt; does not wait for MLflow on a first attempt.

    :param close_timeout: seconds that the record's ``close`` may take.
    """
    file = spec.work_dir / SPOOL_FILE
    if spec.tracking is None:
        return LocalRecord(Spool(file, run_id=None), spec.request.job_uuid)
    limit_http()
    with importing():
        from lightning_modules.mlflow_record import open_mlflow_record  # noqa: PLC0415 - a second of imports

    return open_mlflow_record(spec, file, close_timeout=close_timeout)


def limit_http() -> None:
    """Let MLflow's client of this process raise soon where a server does not answer."""
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


def flatten(params: Mapping[Any, object], prefix: str = "") -> dict[str, str]:
    """Name nested values by dotted keys and write each as a string that MLflow takes uncut."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            plain = not isinstance(value, list | tuple | dict | bool | None)
            text = str(value) if plain else json.dumps(value, default=str)
            flat[name] = text[:MAX_PARAM_CHARACTERS]
    return flat


def describe_checkpoint(job_uuid: str, folder: Path, metrics: PostTrainingMetric) -> Checkpoint:
    """Describe the checkpoint of an epoch that is a folder.

    :raises ValueError: if the folder holds no file.
    """
    require_files(folder)
    return Checkpoint(
        identifier=checkpoint_identifier(job_uuid, metrics.epoch),
        created_at=datetime.now(UTC),
        epoch=metrics.epoch,
        post_training_job_id=job_uuid,
        path=folder.as_posix(),
        training_metrics=metrics,
    )


def require_files(folder: Path) -> None:
    """Refuse a folder that would become an empty checkpoint.

    :raises ValueError: if it holds no file, or does not exist.
    """
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(f"a checkpoint needs files, and {folder} has none")


def now_ms() -> int:
    """The time in milliseconds since the epoch (UTC)."""
    return time.time_ns() // 1_000_000
