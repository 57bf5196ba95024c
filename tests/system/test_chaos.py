"""A short run of the chaos harness: a strike of each kind that it names, and a cancel."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.report import faults, figures, show
from tests.chaos.run import Options, run

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]

STRIKES = ("trainer", "scheduler", "mlflow", "airflow")


def test_jobs_outlive_the_death_of_everything_around_them(tmp_path: Path) -> None:
    options = Options(
        jobs=3,
        kills=len(STRIKES),
        seed=9,
        parallel=2,
        every=6.0,
        cancelled=1 / 3,
        steps=12,
        missed_after=30,
        only=STRIKES,
    )
    found = figures(run(options, tmp_path / "home", Console()))
    show(found, Console(width=160))
    assert faults(found) == []
    assert set(found["kills"]) == set(STRIKES)
    ends = sorted(job["status"] for job in found["jobs"].values())
    assert ends == ["cancelled", "completed", "completed"]
