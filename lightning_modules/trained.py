"""A training that has ended while its uploads have not: what a later attempt needs to finish it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from post_training.schemas.base import LenientModel
from post_training.schemas.jobs import Checkpoint, FiniteOrNull

TRAINED_FILE = "trained.json"


class Trained(LenientModel):
    """What the fit has left, apart from the files of its checkpoints."""

    checkpoints: list[Checkpoint]
    uploaded: list[int] = Field(description="Epochs of the checkpoints that were handed to the record.")
    metrics: dict[str, FiniteOrNull] = Field(description="Last value of each metric.")
    resources: dict[str, Any] = Field(description="What the fit used.")


def read_trained(work_dir: Path) -> Trained | None:
    """Return what an earlier attempt has trained to its end, or None if that is not there whole."""
    try:
        return Trained.model_validate_json((work_dir / TRAINED_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):  # a machine that goes down can leave an empty file
        return None


def write_trained(work_dir: Path, trained: Trained) -> None:
    """Write it complete or not at all."""
    draft = work_dir / f"{TRAINED_FILE}.tmp"
    draft.write_text(trained.model_dump_json(indent=2))
    os.replace(draft, work_dir / TRAINED_FILE)
