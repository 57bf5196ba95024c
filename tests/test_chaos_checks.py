"""The harness's own judgement: each fault that a job may have is seen, and a sound one has none."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from tests.chaos.checks import CHECKS, Ended, differences
from tests.chaos.processes import of_home, running_jobs
from tests.chaos.progress import progress_after, trains
from tests.chaos.records import Trained
from tests.chaos.run import Options, choose
from tests.chaos.strikes import STRIKES, draw

TRAINED = Trained("abc", {"train_loss": [(1, 2.5), (2, 2.25)]})
SOUND = Ended(
    job_uuid="j",
    kind="lora",
    status={"status": "completed", "checkpoints": [{"epoch": 0}, {"epoch": 1}]},
    first_end="completed",
    cancel_accepted=False,
    task={"state": "success"},
    mlflow=[("FINISHED", True)],
    models=[(1, "READY"), (2, "READY")],
    trained=TRAINED,
    reference=TRAINED,
    epochs=2,
    processes=0,
)
CANCELLED = replace(
    SOUND,
    status={"status": "cancelled", "checkpoints": []},
    first_end="cancelled",
    cancel_accepted=True,
    task={"state": "failed"},
    mlflow=[("KILLED", True)],
    models=[],
    trained=None,
)


@pytest.mark.parametrize("job", [SOUND, CANCELLED], ids=["completed", "cancelled"])
def test_a_sound_job_has_no_fault(job: Ended) -> None:
    assert [check(job) for check in CHECKS.values()] == [[]] * len(CHECKS)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("ended once", {"mlflow": [("FINISHED", True), ("FAILED", True)]}),
        ("ended once", {"mlflow": []}),
        ("ended once", {"mlflow": [("FINISHED", False)]}),
        ("ended once", {"mlflow": [("RUNNING", True)]}),
        ("ended once", {"first_end": "failed"}),
        ("ended once", {"task": {"state": "failed"}}),
        ("status", {"cancel_accepted": True}),
        ("weights", {"trained": replace(TRAINED, weights="abd")}),
        ("metrics", {"trained": replace(TRAINED, series={"train_loss": [(1, 2.5)]})}),
        ("checkpoints", {"models": [(1, "READY"), (2, "PENDING")]}),
        ("checkpoints", {"models": [(1, "READY"), (2, "READY"), (2, "READY")]}),
        ("checkpoints", {"status": {"status": "completed", "checkpoints": [{"epoch": 0}]}}),
        ("no orphan", {"processes": 1}),
    ],
)
def test_a_fault_is_seen_by_its_check_alone(check: str, change: dict[str, Any]) -> None:
    job = replace(SOUND, **change)
    assert {name for name, run in CHECKS.items() if run(job)} == {check}


def test_a_job_that_still_runs_has_not_ended() -> None:
    job = replace(
        SOUND, status={"status": "in_progress"}, first_end="in_progress", mlflow=[("RUNNING", True)]
    )
    assert CHECKS["ended once"](job)
    assert CHECKS["status"](job)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ([(1, 2.5)], "missing [2], twice [], other []"),
        ([(1, 2.5), (1, 2.5), (2, 2.25)], "missing [], twice [1], other [((1, 2.5), (2, 2.25))]"),
        ([(1, 2.5), (2, 2.2500002)], "missing [], twice [], other [((2, 2.2500002), (2, 2.25))]"),
    ],
)
def test_metrics_that_differ_are_named(found: list[tuple[int, float]], sentence: str) -> None:
    (fault,) = differences({"train_loss": found}, TRAINED.series)
    assert fault == f"train_loss: {len(found)} points for 2, {sentence}"


def test_the_seed_chooses_everything() -> None:
    options = Options(jobs=20, kills=60, seed=3, parallel=2)
    assert choose(options) == choose(options) != choose(replace(options, seed=4))
    assert sum(job.cancel_after is not None for job in choose(options)) == 2
    first, again = (draw(random.Random(3), 60, every=8, names=tuple(STRIKES)) for _ in range(2))
    assert first == again != draw(random.Random(4), 60, every=8, names=tuple(STRIKES))
    assert sorted(choice.strike for choice in first[: len(STRIKES)]) == sorted(STRIKES)


def test_a_trainer_is_found_by_its_spec_and_only_in_its_own_home(tmp_path: Path) -> None:
    spec = tmp_path / "jobs" / "jobs" / "dag" / "job-1" / "train" / "spec.json"
    spec.parent.mkdir(parents=True)
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(99)", str(spec)]
    with Popen(command, cwd=spec.parent) as trainer:
        try:
            (job,) = running_jobs(tmp_path).items()
            assert (job[0], job[1].trainer.pid) == ("job-1", trainer.pid)
            assert job[1].task is None  # this process is not of the home
            assert running_jobs(tmp_path / "jo") == {}  # the path of a home may begin another's
            assert [process.pid for process in of_home(tmp_path)] == [trainer.pid]
        finally:
            trainer.kill()
    assert of_home(tmp_path) == []


def test_a_job_trains_once_its_newest_attempt_has_done_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "jobs" / "dag" / "job-1" / "train"
    folder.mkdir(parents=True)
    assert not trains(tmp_path, "job-1")
    (folder / "train-9.log").write_text("progress step 1/2\n")
    assert trains(tmp_path, "job-1")
    (folder / "train-10.log").write_text("loading\n")
    assert not trains(tmp_path, "job-1")


def test_only_a_later_attempt_is_progress(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "jobs" / "dag" / "job-1" / "train"
    folder.mkdir(parents=True)
    first, second = folder / "train-1.log", folder / "train-2.log"
    first.write_text("progress step 1/2\n")
    progressed = progress_after(tmp_path, "job-1")
    first.write_text("progress step 1/2\nprogress step 2/2\n")
    assert not progressed()
    second.write_text("loading\n")
    assert not progressed()
    second.write_text("loading\nprogress step 2/2\n")
    assert progressed()


@pytest.mark.parametrize(("jobs", "kills", "parallel"), [(50, 100, 4), (5, 6, 2), (2, 9, 4), (30, 7, 1)])
def test_no_job_waits_for_a_strike_that_waits_for_a_job(jobs: int, kills: int, parallel: int) -> None:
    options = Options(jobs=jobs, kills=kills, seed=1, parallel=parallel)
    for number in range(jobs):
        ended = max(number - options.at_once + 1, 0)  # all others that have started still run
        assert options.strikes_due(number) <= options.strikes_allowed(ended)
    assert options.strikes_due(jobs - 1) == (kills if jobs >= options.at_once else 0)
