"""What a training that ended hands on to the attempt that finishes its uploads."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.trained import TRAINED_FILE, Trained, job_of, read_trained, write_trained
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


def test_it_is_read_as_it_was_written_and_leaves_no_draft(make_spec: Any) -> None:
    spec = make_spec()
    trained = Trained(
        job=job_of(spec),
        checkpoints=[CHECKPOINT],
        uploaded=[0],
        metrics={"train_loss": 0.1 + 0.2},
        resources={"tokens": 7},
    )
    write_trained(spec.work_dir, trained)
    assert read_trained(spec) == trained
    assert [path.name for path in spec.work_dir.iterdir()] == [TRAINED_FILE]


def test_another_training_or_another_run_is_not_taken_for_it(make_spec: Any) -> None:
    spec = make_spec(tracking={"tracking_uri": "http://mlflow", "run_id": "a"})
    write_trained(
        spec.work_dir, Trained(job=job_of(spec), checkpoints=[], uploaded=[], metrics={}, resources={})
    )
    assert (
        read_trained(spec.model_copy(update={"begun": True, "attempt": 2, "attempt_id": "0199-b"}))
        is not None
    )
    elsewhere = {"cache_dir": Path("/another/home/cache"), "max_cache_bytes": 1, "max_data_bytes": 1}
    assert read_trained(spec.model_copy(update=elsewhere)) is not None
    for other in (
        make_spec(training={"n_epochs": 3}, tracking=spec.tracking.model_dump()),
        make_spec(tracking={"tracking_uri": "http://mlflow", "run_id": "b"}),
        spec.model_copy(update={"train_data": "/other.jsonl"}),
    ):
        assert read_trained(other) is None


def test_a_metric_that_is_not_finite_is_null(make_spec: Any) -> None:
    spec = make_spec()
    metrics = {"perplexity": math.inf, "validation_loss": math.nan}
    trained = Trained(job=job_of(spec), checkpoints=[], uploaded=[], metrics=metrics, resources={})
    write_trained(spec.work_dir, trained)
    read = read_trained(spec)
    assert read is not None
    assert read.metrics == {"perplexity": None, "validation_loss": None}


def test_a_training_that_has_not_ended_has_none(make_spec: Any) -> None:
    spec = make_spec()
    assert read_trained(spec) is None
    (spec.work_dir / f"{TRAINED_FILE}.tmp").write_text("{")  # killed while it was written
    assert read_trained(spec) is None


@pytest.mark.parametrize("content", ["", '{"checkpoints": ['])
def test_what_is_not_whole_is_trained_again(content: str, make_spec: Any) -> None:
    spec = make_spec()
    (spec.work_dir / TRAINED_FILE).write_text(content)
    assert read_trained(spec) is None
