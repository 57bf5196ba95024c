"""The large things of a job's record, sent in order by a thread of their own: checkpoints, resume states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from mlflow.exceptions import MlflowException

from lightning_modules.delivery import UNKNOWN_RUN
from lightning_modules.fencing import RunFence
from lightning_modules.logged_models import LoggedModels, Point
from lightning_modules.sender import RefusedError
from lightning_modules.spool import Event, Spool
from lightning_modules.stored_state import StateStore
from lightning_modules.trained import sha256_of
from post_training.schemas.jobs import PostTrainingMetric
from post_training.schemas.trainer import UPLOADED, StoredState

_log = logging.getLogger(__name__)

METRICS_PATIENCE = 30.0
"""Seconds that a state waits for the metrics before it."""

SENDING = "sending"
"""Folder of the state whose upload has begun, beside that of the one that waits."""

_POLL_SECONDS = 0.2


class UploadDelivery:
    """Sends the events of the spool of uploads; each may be repeated.

    Files that are no longer there are passed over: a later event has replaced or removed what they were.

    A state gives way: one that cannot be stored is passed over as soon as something newer waits behind it.

    :param metrics: the spool of the metrics. A state is announced only when all that was recorded before it
        has arrived: an attempt on another machine goes on behind it, and would leave a gap.
    :param uploads: the spool whose events are sent.
    """

    def __init__(
        self, fence: RunFence, models: LoggedModels, states: StateStore, *, metrics: Spool, uploads: Spool
    ) -> None:
        self._fence = fence
        self._models = models
        self._states = states
        self._metrics = metrics
        self._uploads = uploads
        self.ended = False
        """Whether the training is: no state is stored any more."""
        self.last_seconds = 0.0
        """How long the newest state took."""
        self._senders: dict[str, Callable[[Event], None]] = {
            "checkpoint": self._checkpoint,
            "discard": lambda event: self._models.delete(event["epoch"]),
            "state": self._state,
        }

    def __call__(self, kind: str, events: Sequence[Event]) -> None:
        """Send events of one kind.

        :raises SupersededError: if a newer attempt has taken over.
        :raises RefusedError: if MLflow does not know the run or a model: ``settled`` finds what is missing;
            or if a state gives way.
        :raises Exception: whatever a later try may overcome.
        """
        for event in events:
            try:
                self._fence.check(now=True)
                self._senders[kind](event)
            except MlflowException as error:
                if error.error_code == UNKNOWN_RUN:
                    raise RefusedError(str(error)) from error
                raise

    def _checkpoint(self, event: Event) -> None:
        folder = Path(event["folder"])
        if not folder.exists():
            _log.info("the checkpoint %s was removed before it was uploaded", folder.name)
            return
        metrics = PostTrainingMetric.model_validate(event["metrics"])
        points = [Point(**point) for point in event["points"]]
        published = self._models.publish(folder, step=event["step"], metrics=metrics, points=points)
        _log.info("%s%s", UPLOADED, published.path)

    def _state(self, event: Event) -> None:
        file = _held(Path(event["file"]))
        if not file.exists():
            return
        if not self.ended and not self._states.has(step=event["step"], inputs=event["inputs"]):
            started = monotonic()
            try:
                path = self._states.upload(file)
                self._wait_for_metrics(event["after"])
            except Exception as error:
                if not self.ended and len(self._uploads.pending(limit=2)) < 2:
                    raise
                file.unlink()
                raise RefusedError(f"it gives way to what is newer: {error}") from error
            self._fence.check(now=True)
            self._states.announce(
                StoredState(path=path, step=event["step"], inputs=event["inputs"], sha256=sha256_of(file))
            )
            self.last_seconds = monotonic() - started
        file.unlink()

    def _wait_for_metrics(self, size: int) -> None:
        deadline = monotonic() + METRICS_PATIENCE
        while self._metrics.sent < size:
            if monotonic() > deadline:
                raise TimeoutError("the metrics before the state were not sent yet")
            sleep(_POLL_SECONDS)


def _held(waiting: Path) -> Path:
    """Take a state away from where the next one replaces it: epochs may be shorter than its upload."""
    held = waiting.parent.with_name(SENDING) / waiting.name
    held.parent.mkdir(exist_ok=True)
    with suppress(FileNotFoundError):  # replaced, or held since an earlier try
        waiting.replace(held)
    return held


def checkpoint_event(
    folder: Path, step: int, metrics: PostTrainingMetric, points: Sequence[Point]
) -> dict[str, Any]:
    """Describe a checkpoint that is to be uploaded."""
    return {
        "kind": "checkpoint",
        "folder": folder.as_posix(),
        "step": step,
        "metrics": metrics.model_dump(mode="json"),
        "points": [{"key": p.key, "value": p.value, "time": p.time} for p in points],
    }
