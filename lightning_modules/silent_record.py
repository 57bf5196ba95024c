"""The record of the processes that only compute, beside the first one, which writes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from post_training.schemas.jobs import Checkpoint, PostTrainingMetric


class SilentRecord:
    """A :class:`lightning_modules.record.JobRecord` that keeps nothing."""

    superseded = False
    """The first process knows, and tells the others to stop."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Do nothing."""

    def set_tag(self, key: str, value: str) -> None:
        """Do nothing."""

    def left(self, key: str) -> list[str]:
        """Find nothing."""
        return []

    def log_dataset(
        self, *, name: str, digest: str, source: str, rows: int, context: Literal["training", "validation"]
    ) -> None:
        """Do nothing."""

    def log_checkpoint(self, folder: Path, *, step: int, metrics: PostTrainingMetric) -> Checkpoint:
        """Only the first process has checkpoints."""
        raise NotImplementedError

    def note_checkpoint(self, folder: Path, *, metrics: PostTrainingMetric) -> Checkpoint:
        """Only the first process has checkpoints."""
        raise NotImplementedError

    def settled(
        self, checkpoints: Sequence[Checkpoint], uploaded: Collection[int], give_up: Callable[[], bool]
    ) -> list[Checkpoint]:
        """Only the first process has checkpoints."""
        return []

    def log_state(self, file: Path, *, step: int, inputs: str, must: bool) -> None:
        """Do nothing."""

    def restore_state(
        self, file: Path, *, step: int | None, inputs: str, give_up: Callable[[], bool]
    ) -> int | None:
        """Find nothing."""
        return None

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Do nothing."""

    def history(self, key: str) -> list[tuple[int, float]]:
        """Find nothing."""
        return []

    def log_figure(self, file: Path) -> None:
        """Do nothing."""

    def begin(self, inputs: str, *, here: str | None, give_up: Callable[[], bool]) -> None:
        """Do nothing."""

    def discard_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
