"""What a training that ended hands on to the attempt that finishes its uploads."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lightning_modules.trained import TRAINED_FILE, Trained, read_trained, write_trained
from post_training.schemas.jobs import Checkpoint
from tests.lightning_modules.recorded import EPOCH_0

CHECKPOINT = Checkpoint(
    identifier="job-1-epoch-0",
    created_at=datetime(2026, 11, 24, tzinfo=UTC),
    epoch=0,
    post_training_job_id="job-1",
    path="/work/checkpoints/epoch-0",
    training_metrics=EPOCH_0,
)


def test_it_is_read_as_it_was_written_and_leaves_no_draft(tmp_path: Path) -> None:
    trained = Trained(
        checkpoints=[CHECKPOINT], uploaded=[0], metrics={"train_loss": 0.1 + 0.2}, resources={"tokens": 7}
    )
    write_trained(tmp_path, trained)
    assert read_trained(tmp_path) == trained
    assert [path.name for path in tmp_path.iterdir()] == [TRAINED_FILE]


def test_a_metric_that_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = {"perplexity": math.inf, "validation_loss": math.nan}
    write_trained(tmp_path, Trained(checkpoints=[], uploaded=[], metrics=metrics, resources={}))
    read = read_trained(tmp_path)
    assert read is not None
    assert read.metrics == {"perplexity": None, "validation_loss": None}


def test_a_training_that_has_not_ended_has_none(tmp_path: Path) -> None:
    assert read_trained(tmp_path) is None
    (tmp_path / f"{TRAINED_FILE}.tmp").write_text("{")  # killed while it was written
    assert read_trained(tmp_path) is None


@pytest.mark.parametrize("content", ["", '{"checkpoints": ['])
def test_what_is_not_whole_is_trained_again(content: str, tmp_path: Path) -> None:
    (tmp_path / TRAINED_FILE).write_text(content)
    assert read_trained(tmp_path) is None
