"""What a trial's trainer has measured so far, read from its own record while it runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from post_training.errors import RecordUnavailableError
from post_training.launch.process import WorkerProcess
from post_training.schemas.trainer import METRICS_FILE
from post_training.search import Search, Trial

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Time between two looks while the trainer writes line after line."""

STEPS = "steps"
"""Param of the trainer: optimizer steps in all."""


class TrialProgress:
    """Reads the values of one metric at each epoch's end.

    :param folder: the trial's.
    :param n_epochs: of the trial.
    :ivar data: digest of the rows for training, and of those for validation, as far as they were read.
    """

    def __init__(self, folder: Path, metric: str, n_epochs: int) -> None:
        self._file = folder / METRICS_FILE
        self._metric = metric
        self._n_epochs = n_epochs
        self._offset = 0
        self._steps: int | None = None
        self.data: dict[str, str] = {}

    def new(self) -> Iterator[tuple[int, float]]:
        """Yield each epoch, counted from 1, and the value at its end, since the last call."""
        for event in self._events():
            if event["kind"] == "param" and event["key"] == STEPS:
                self._steps = int(event["value"])
            if event["kind"] == "dataset":
                self.data[event["context"]] = event["digest"]
            if event["kind"] != "metrics" or not event["step"] or not self._steps:
                continue
            value = event["values"].get(self._metric)
            if value is not None:
                yield event["step"] * self._n_epochs // self._steps, float(value)

    def _events(self) -> Iterator[dict[str, Any]]:
        if not self._file.exists():
            return
        with self._file.open("rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):  # it is being written
                    return
                self._offset += len(line)
                yield json.loads(line)


class Pruning:
    """Reports a trial's values as they come, and stops its trainer when it falls behind."""

    def __init__(self, search: Search, trial: Trial, progress: TrialProgress, last_epoch: int) -> None:
        self._search = search
        self._trial = trial
        self._progress = progress
        self._last_epoch = last_epoch
        self._looked_at = 0.0
        self._unreported: list[tuple[int, float]] = []
        self.wanted = False

    def __call__(self, process: WorkerProcess) -> None:
        """Look, unless that was done a moment ago; the trainer works on where nothing can be reported."""
        if monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = monotonic()
        try:
            self.report()
        except RecordUnavailableError as unavailable:
            logger.warning("%s; the trial goes on", unavailable)
        if self.wanted:
            process.stop()

    def report(self) -> None:
        """Report what is new; a trial in whose last epoch nothing can be saved any more is not stopped.

        :raises RecordUnavailableError: if the search's storage does not answer; it may then be called again.
        """
        self._unreported.extend(self._progress.new())
        while self._unreported:
            epoch, value = self._unreported[0]
            behind = self._search.report(self._trial, epoch, value)
            self.wanted = self.wanted or (behind and epoch < self._last_epoch)
            del self._unreported[0]
