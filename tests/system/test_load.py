"""Many clients at once: no job is lost and none is there twice. ``benchmarks.load`` has the full numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.load import Jobs, done, jobs, pause, poll, submit_at_once
from post_training.standalone import DAG_IDS
from tests.system.conftest import Deployment

pytestmark = pytest.mark.system


@pytest.fixture(autouse=True)
def before(deployment: Deployment) -> Iterator[Jobs]:
    """What both servers hold; nothing that is submitted here trains or stays."""
    held = jobs(deployment.servers)
    pause(deployment.servers)
    yield held
    with deployment.http() as http:
        for run_id in jobs(deployment.servers).dag_runs - held.dag_runs:
            done(http, "DELETE", f"/api/v2/dags/{DAG_IDS[0]}/dagRuns/{run_id}")
    pause(deployment.servers, paused=False)


def test_distinct_jobs_at_once(deployment: Deployment, before: Jobs) -> None:
    ids = [f"distinct-{number}" for number in range(60)]
    answers = submit_at_once(deployment.servers, [deployment.body(job_uuid) for job_uuid in ids])
    assert {answer.status for answer in answers} == {200}
    held = jobs(deployment.servers)
    assert held.dag_runs - before.dag_runs == Counter(ids)
    assert held.mlflow_runs - before.mlflow_runs == Counter(ids)
    polls = poll(deployment.servers, ids, seconds=5)
    assert {answer.status for answer in polls} == {200}
    assert len(polls) >= len(ids)


def test_the_same_job_at_once(deployment: Deployment, before: Jobs) -> None:
    answers = submit_at_once(deployment.servers, [deployment.body("same")] * 60)
    assert {answer.status for answer in answers} == {200}
    held = jobs(deployment.servers)
    assert held.dag_runs - before.dag_runs == Counter(["same"])
    assert held.mlflow_runs - before.mlflow_runs == Counter(["same"])
