"""A training that has ended while its uploads have not: what a later attempt needs to finish it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from post_training.schemas.base import LenientModel
from post_training.schemas.jobs import Checkpoint, FiniteOrNull
from post_training.schemas.trainer import TrainerSpec

TRAINED_FILE = "trained.json"
OF_AN_ATTEMPT = {
    "attempt",
    "attempt_id",
    "begun",
    "cache_dir",
    "keep_state_in_mlflow",
    "max_cache_bytes",
    "max_data_bytes",
    "node_patience",
}
"""What in a spec may differ between two attempts at the same."""


class Trained(LenientModel):
    """What the fit has left, apart from the files of its checkpoints."""

    job: str = Field(description="Digest of what was asked for, and of the run that it was recorded in.")
    checkpoints: list[Checkpoint]
    uploaded: list[int] = Field(description="Epochs of the checkpoints that were handed to the record.")
    metrics: dict[str, FiniteOrNull] = Field(description="Last value of each metric.")
    resources: dict[str, Any] = Field(description="What the fit used.")


def job_of(spec: TrainerSpec) -> str:
    """Return the digest by which all attempts at one training, in one run, know each other."""
    return hashlib.sha256(spec.model_dump_json(exclude=OF_AN_ATTEMPT).encode()).hexdigest()


def read_trained(spec: TrainerSpec) -> Trained | None:
    """Return what an earlier attempt at the same has trained to its end; None if that is not there whole."""
    try:
        trained = Trained.model_validate_json((spec.work_dir / TRAINED_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):  # a machine that goes down can leave an empty file
        return None
    return trained if trained.job == job_of(spec) else None


def write_trained(work_dir: Path, trained: Trained) -> None:
    """Write it complete or not at all."""
    write_whole(work_dir / TRAINED_FILE, trained.model_dump_json(indent=2))


def write_whole(file: Path, text: str) -> None:
    """Write a small file complete or not at all.

    :raises OSError: when the disk refuses; the file is then as it was.
    """
    draft = file.with_name(f"{file.name}.tmp")
    draft.write_text(text)
    rename_whole(draft, file)


def rename_whole(draft: Path, file: Path) -> None:
    """Rename a draft once it is on the disk: a machine that goes down leaves the old file or the new one.

    :param draft: a file; or a folder, where no other has the name.
    """
    for part in draft.rglob("*") if draft.is_dir() else [draft]:
        with part.open("rb") as written:
            os.fsync(written.fileno())
    os.replace(draft, file)


def sha256_of(file: Path) -> str:
    """Return the digest of a file's content in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
