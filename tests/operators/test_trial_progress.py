"""What is read of a trial's record while its trainer writes it, and when that stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.record import SPOOL_FILE, LocalRecord
from lightning_modules.spool import Spool
from post_training.errors import RecordUnavailableError
from post_training.operators.trial_progress import Pruning, TrialProgress


class Record:
    """A trainer's own record: of six optimizer steps in three epochs."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / SPOOL_FILE
        self.record = LocalRecord(Spool(self.file, "run-1"), "job-1")

    def begin(self) -> None:
        self.record.log_params({"seed": 1, "steps": 6})

    def measure(self, step: int, value: float) -> None:
        self.record.log_metrics({"validation_loss": value, "perplexity": 9.0}, step)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path)


def test_the_trainers_own_record_is_read_as_it_grows(tmp_path: Path, record: Record) -> None:
    progress = TrialProgress(tmp_path, "validation_loss", 3)
    assert list(progress.new()) == []
    record.begin()
    record.measure(0, 5.0)  # of the untrained model
    record.record.log_metrics({"train_loss": 4.0}, 2)
    assert list(progress.new()) == []
    record.measure(2, 3.0)
    record.measure(4, float("nan"))
    assert list(progress.new()) == [(1, 3.0)]
    record.measure(6, 1.0)
    assert list(progress.new()) == [(3, 1.0)]
    assert list(TrialProgress(tmp_path, "perplexity", 3).new()) == [(1, 9.0), (2, 9.0), (3, 9.0)]


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path: Path, record: Record) -> None:
    progress = TrialProgress(tmp_path, "validation_loss", 3)
    record.begin()
    line = json.dumps({"kind": "metrics", "time": 0, "step": 2, "values": {"validation_loss": 3.0}})
    with record.file.open("a") as out:
        out.write(line[:20])
        out.flush()
        assert list(progress.new()) == []
        out.write(f"{line[20:]}\n")
    assert list(progress.new()) == [(1, 3.0)]


def test_the_data_is_what_the_trainer_says(tmp_path: Path, record: Record) -> None:
    progress = TrialProgress(tmp_path, "validation_loss", 3)
    for context in ("training", "validation"):
        record.record.log_dataset(
            name="rows", digest=f"of {context}", source="rows.jsonl", rows=3, context=context
        )
    assert list(progress.new()) == []
    assert progress.data == {"training": "of training", "validation": "of validation"}


class Study:
    """Wants to stop a trial from an epoch on."""

    def __init__(self, behind_from: int) -> None:
        self.behind_from = behind_from
        self.away = False
        self.reported: list[tuple[int, float]] = []

    def report(self, trial: Any, epoch: int, value: float) -> bool:
        if self.away:
            raise RecordUnavailableError("The search's storage does not answer")
        self.reported.append((epoch, value))
        return epoch >= self.behind_from


class Process:
    """Counts how often it was asked to stop."""

    def __init__(self) -> None:
        self.stops = 0

    def stop(self) -> None:
        self.stops += 1


def watched(folder: Path, study: Study) -> Pruning:
    progress = TrialProgress(folder, "validation_loss", 3)
    return Pruning(study, None, progress, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("behind_from", "stops"), [(1, 1), (2, 1), (3, 0), (9, 0)])
def test_a_trainer_is_stopped_unless_it_is_about_to_end(
    tmp_path: Path, record: Record, behind_from: int, stops: int
) -> None:
    study, process = Study(behind_from), Process()
    record.begin()
    for step in (2, 4, 6):
        record.measure(step, float(step))
    pruning = watched(tmp_path, study)
    pruning(process)  # type: ignore[arg-type]
    assert (process.stops, pruning.wanted) == (stops, bool(stops))
    assert study.reported == [(1, 2.0), (2, 4.0), (3, 6.0)]


def test_it_is_not_looked_at_with_every_line(tmp_path: Path, record: Record) -> None:
    study, process = Study(1), Process()
    record.begin()
    pruning = watched(tmp_path, study)
    pruning(process)  # type: ignore[arg-type]
    record.measure(2, 1.0)
    pruning(process)  # type: ignore[arg-type]
    assert study.reported == []
    pruning.report()
    assert study.reported == [(1, 1.0)]


def test_a_storage_that_is_away_stops_no_trainer_and_loses_no_value(tmp_path: Path, record: Record) -> None:
    study, process = Study(1), Process()
    record.begin()
    record.measure(2, 2.0)
    record.measure(4, 4.0)
    pruning = watched(tmp_path, study)
    study.away = True
    pruning(process)  # type: ignore[arg-type]
    assert (process.stops, study.reported) == (0, [])
    with pytest.raises(RecordUnavailableError):
        pruning.report()
    study.away = False
    pruning.report()
    assert study.reported == [(1, 2.0), (2, 4.0)]
    assert pruning.wanted
