"""The job's record in its MLflow run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from time import monotonic
from typing import TypeVar

from mlflow import MlflowClient

from lightning_modules.delivery import MLflowDelivery
from lightning_modules.fencing import RunFence
from lightning_modules.kept import link
from lightning_modules.logged_models import LoggedModels, Point
from lightning_modules.record import CLOSE_TIMEOUT, LocalRecord, now_ms, require_files
from lightning_modules.recorded import Recorded, what_is_recorded
from lightning_modules.sender import Sender
from lightning_modules.spool import Spool
from lightning_modules.stored_state import StateStore
from lightning_modules.uploads import UploadDelivery, checkpoint_event
from post_training.errors import InputsChangedError, RecordUnavailableError
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric
from post_training.schemas.record import (
    METRIC_PERPLEXITY,
    METRIC_TRAIN_LOSS,
    METRIC_VALIDATION_LOSS,
    TAG_INPUTS,
)
from post_training.schemas.trainer import RESUME_FOLDER, TrainerSpec

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

SHORT_PAUSES = (1.0, 3.0, 9.0)
"""Seconds between the tries of what can be done without."""

PATIENCE_SECONDS = 600.0
"""How long the trainer waits for MLflow where it cannot go on without: before it trains on another machine's
state, and at its end for its checkpoints to arrive."""

STATE_SECONDS, STATE_SHARE = 15.0, 0.1
"""A state is uploaded every so many seconds, or so rarely that it takes 10 % of the time; at an epoch's end
in any case."""

TABLES_SPOOL_FILE = "tables.jsonl"
UPLOADS_SPOOL_FILE = "uploads.jsonl"
STATES = Path(RESUME_FOLDER, "waiting")
"""Folder of the state that waits for its upload."""

METRIC_EPOCH_TRAIN_LOSS = f"{METRIC_TRAIN_LOSS}_epoch"
"""A model's own mean training loss. MLflow also shows a model's metrics as the run's, where
``train_loss`` is a series of single steps: the two must not mix."""


class MLflowRecord(LocalRecord):
    """One MLflow run, written to by its id; its status is left to whoever made it.

    Nothing waits for MLflow but what cannot go on without it. What is to be sent lies in three spools: a
    store of artifacts that is down holds up no metrics, and a large checkpoint no small table.

    :param spool: of the metrics, params and tags; the others lie beside it.
    :param close_timeout: seconds that ``close`` may take.
    :param patience: seconds for which MLflow is waited for.
    """

    def __init__(
        self,
        client: MlflowClient,
        spec: TrainerSpec,
        spool: Spool,
        *,
        close_timeout: float = CLOSE_TIMEOUT,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        super().__init__(spool, spec.request.job_uuid)
        assert spec.tracking is not None  # noqa: S101
        run_id = spec.tracking.run_id
        self._retried = spec.begun
        self._opened_at = now_ms()
        self._client = client
        self._run_id = run_id
        self._keeps_states = spec.keep_state_in_mlflow
        self._close_timeout = close_timeout
        self._patience = patience
        self._next_state = 0.0
        self._before = Recorded()
        self._fence = RunFence(client, run_id, spec.attempt_id, on_ray=spec.request.on_ray)
        self._models = LoggedModels(client, run_id, spec.request.job_uuid)
        self._states = StateStore(client, spec.tracking.tracking_uri, run_id)
        self._delivery = MLflowDelivery(client, run_id, spool.folder, self._fence)
        self._tables = Spool(spool.folder / TABLES_SPOOL_FILE, run_id)
        self._uploads = Spool(spool.folder / UPLOADS_SPOOL_FILE, run_id)
        self._upload_delivery = UploadDelivery(
            self._fence, self._models, self._states, metrics=spool, uploads=self._uploads
        )
        self._tables_sender = Sender(self._tables, self._delivery)
        self._senders = [
            Sender(spool, self._delivery, watch=self._fence.check),
            self._tables_sender,
            Sender(self._uploads, self._upload_delivery),
        ]
        self._started = False
        if not self._retried:  # a retry must know what an attempt elsewhere has recorded since
            self._start()

    def begin(self, inputs: str, *, here: str | None, give_up: Callable[[], bool]) -> None:
        """Go on; only now is sent what earlier attempts on this machine have left, if it is of the run.

        One on another machine may have recorded the same since, or begun something else.

        :raises InputsChangedError: if they trained something else, and all of it was sent.
        :raises RecordUnavailableError: if MLflow does not say what earlier attempts recorded, or does not
            take the rest of it.
        """
        recorded = self._before = self._ask(give_up) if self._retried else Recorded()
        for key, step in recorded.steps.items():
            self._recorded[key] = max(step, self._recorded.get(key, step))
        self._delivery.leave_out(recorded.steps, self._opened_at)
        try:
            for before in (here, recorded.inputs):
                super().begin(inputs, here=before, give_up=give_up)
        except InputsChangedError:
            if recorded.inputs is None or here in (None, recorded.inputs):  # what waits here is this run's
                self._upload_delivery.ended = True  # nobody goes on from a state that waits
                self._start()
                self._wait_until_sent(give_up)
            raise
        self.set_tag(TAG_INPUTS, inputs)
        self._start()

    def _ask(self, give_up: Callable[[], bool]) -> Recorded:
        """Ask MLflow what the run holds: the attempt before may have run on another machine."""
        deadline = monotonic() + self._patience
        try:
            return self._persist(lambda: what_is_recorded(self._client, self._run_id), deadline, give_up)
        except Exception as error:
            raise RecordUnavailableError(f"MLflow does not say what is recorded: {error}") from error

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for sender in self._senders:
                sender.start()

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt has taken over the run."""
        return self._fence.superseded

    def left(self, key: str) -> list[str]:
        """Return what the spool holds of a tag, and what the run held when this attempt began."""
        of_run = self._before.tags.get(key)
        return super().left(key) + ([] if of_run is None else [of_run])

    def log_checkpoint(self, folder: Path, *, step: int, metrics: PostTrainingMetric) -> Checkpoint:
        """Have the folder uploaded as a logged model of the run.

        :raises ValueError: if the folder holds no file.
        """
        require_files(folder)
        points = self._model_points(metrics, step)
        self._uploads.append([checkpoint_event(folder, step, metrics, points)])
        return super().log_checkpoint(folder, step=step, metrics=metrics)

    def settled(
        self, checkpoints: Sequence[Checkpoint], uploaded: Collection[int], give_up: Callable[[], bool]
    ) -> list[Checkpoint]:
        """Wait until the uploads have arrived, and return the checkpoints as MLflow knows them.

        One that somebody has deleted in MLflow is uploaded again, or left out where its folder is gone too.

        :raises RecordUnavailableError: if some have not, after an outage as long as this record's patience.
        """
        self._upload_delivery.ended = True
        if self._retried and not self._started:  # what is trained is not trained again
            self._delivery.leave_out(self._ask(give_up).steps, self._opened_at)
        self._start()
        ready = self._arrived(give_up)
        missing = {epoch for epoch in uploaded if epoch not in ready}
        again = self._upload_again(missing)
        if again:
            ready = self._arrived(give_up)
        for epoch in again:
            if epoch not in ready:
                raise RecordUnavailableError(f"MLflow has no checkpoint of epoch {epoch}.")
        lost = missing - again
        for epoch in sorted(lost):
            _log.warning("the checkpoint of epoch %d is neither in MLflow nor on this machine", epoch)
        return [ready.get(each.epoch, each) for each in checkpoints if each.epoch not in lost]

    def _arrived(self, give_up: Callable[[], bool]) -> dict[int, Checkpoint]:
        """Wait until all was sent, and return the checkpoints that MLflow has by epoch.

        :raises RecordUnavailableError: after an outage as long as this record's patience.
        """
        self._wait_until_sent(give_up)
        return self._persist(self._models.ready, monotonic() + self._patience, give_up)

    def _wait_until_sent(self, give_up: Callable[[], bool]) -> None:
        needed = (sender for sender in self._senders if sender is not self._tables_sender)
        if not all(sender.drained(self._patience, give_up) for sender in needed):
            raise RecordUnavailableError(
                f"MLflow did not take its record in {self._patience:g} s:"
                " another attempt sends the rest without training it again."
            )
        if not self._tables_sender.drained(self._close_timeout, give_up):
            _log.warning("MLflow did not take all tables and pictures: they stay in the job's folder")

    def _upload_again(self, missing: Collection[int]) -> set[int]:
        """Have the checkpoints of these epochs uploaded once more; return those whose folder is there."""
        handed_over = {
            int(event["metrics"]["epoch"]): event
            for event in self._uploads.events()
            if event["kind"] == "checkpoint"
        }
        again = {
            epoch: handed_over[epoch]
            for epoch in sorted(missing)
            if epoch in handed_over and Path(handed_over[epoch]["folder"]).exists()
        }
        self._uploads.append(again.values())
        return set(again)

    def log_state(self, file: Path, *, step: int, inputs: str, must: bool) -> None:
        """Have a copy of the state uploaded, in place of one that still waits.

        :param must: whether it is so even shortly after the one before.
        """
        if not self._keeps_states or not (must or monotonic() >= self._next_state):
            return
        waiting = self._spool.folder / STATES
        waiting.mkdir(parents=True, exist_ok=True)
        for older in waiting.iterdir():
            older.unlink(missing_ok=True)  # the uploader may have done it
        copy = waiting / f"step-{step}.ckpt"
        link(file, copy)
        event = {"file": copy.as_posix(), "step": step, "inputs": inputs, "after": self._spool.size}
        self._uploads.append([{"kind": "state", **event}])
        pause = max(STATE_SECONDS, self._upload_delivery.last_seconds / STATE_SHARE)
        self._next_state = monotonic() + pause

    def restore_state(
        self, file: Path, *, step: int | None, inputs: str, give_up: Callable[[], bool]
    ) -> int | None:
        """Replace the state by MLflow's, if that is newer and of the same training.

        :raises RecordUnavailableError: if there is no state here and MLflow does not say whether it has one.
        """

        def restore() -> int | None:
            state = self._states.newest()
            if state is None or state.inputs != inputs or (step is not None and state.step <= step):
                return None
            return state.step if self._states.download(state, file) else None

        try:
            patience = self._patience if step is None else 0.0
            return self._persist(restore, monotonic() + patience, give_up)
        except Exception as error:
            if step is None:
                raise RecordUnavailableError(f"MLflow does not say where to go on: {error}") from error
            _log.warning("MLflow does not say whether it has a newer state than step %d: %s", step, error)
            return None

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write the table's file in the job's folder, and have it sent."""
        super().log_table(name, columns, rows)
        self._tables.append([{"kind": "table", "name": name}])

    def history(self, key: str) -> list[tuple[int, float]]:
        """Return what the spool holds of a metric, and what the run held when this attempt began."""
        return sorted({**self._before.points.get(key, {}), **self._spool.points(key)}.items())

    def log_figure(self, file: Path) -> None:
        """Have the picture sent."""
        self._tables.append([{"kind": "figure", "name": file.name}])

    def discard_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Have the epoch's logged model deleted, and its tag removed."""
        super().discard_checkpoint(checkpoint)
        self._uploads.append([{"kind": "discard", "epoch": checkpoint.epoch}])

    def close(self) -> None:
        """Send what waits; what could not be sent in time stays on disk for the next attempt.

        All of it does if this attempt never began: another machine may have recorded the same since.
        """
        if not self._started:
            return
        deadline = monotonic() + self._close_timeout
        sent = [sender.close(max(0.0, deadline - monotonic())) for sender in self._senders]
        if not all(sent) and not self.superseded:
            _log.warning("Part of the record was not sent in %g s and is kept on disk", self._close_timeout)

    def _persist(self, call: Callable[[], _T], deadline: float, give_up: Callable[[], bool]) -> _T:
        """Call until it succeeds or the time is over."""
        pauses = iter(SHORT_PAUSES)
        while True:
            try:
                return call()
            except Exception as error:  # MLflow and its HTTP client share no base class
                pause = next(pauses, SHORT_PAUSES[-1])
                if give_up() or monotonic() + pause > deadline:
                    raise
                _log.warning("MLflow did not answer and is asked again in %g s: %s", pause, error)
                time.sleep(pause)

    def _model_points(self, metrics: PostTrainingMetric, step: int) -> list[Point]:
        """Take the run's own values and times where it has them, so that none is doubled.

        A repeat of an epoch may differ in the last digits.

        Values that are not finite (None) are left out: MLflow stores a model's NaN as 0.
        """
        values = {
            METRIC_EPOCH_TRAIN_LOSS: metrics.train_loss,
            METRIC_VALIDATION_LOSS: metrics.validation_loss,
            METRIC_PERPLEXITY: metrics.perplexity,
        }
        own = {key: self._spool.point_at(key, step) or (value, None) for key, value in values.items()}
        return [Point(key, value, time) for key, (value, time) in own.items() if value is not None]


def open_mlflow_record(
    spec: TrainerSpec, file: Path, *, close_timeout: float, patience: float = PATIENCE_SECONDS
) -> MLflowRecord:
    """Open the record of a spec's run.

    :param file: the spool of the metrics.
    :param close_timeout: seconds that the record's ``close`` may take.
    :param patience: seconds for which MLflow is waited for.
    """
    assert spec.tracking is not None  # noqa: S101
    client = MlflowClient(tracking_uri=spec.tracking.tracking_uri)
    return MLflowRecord(
        client,
        spec,
        Spool(file, spec.tracking.run_id),
        close_timeout=close_timeout,
        patience=patience,
    )
