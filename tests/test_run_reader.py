"""Many runs at once, on a real MLflow server."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from post_training.errors import RecordUnavailableError
from post_training.run_reader import RunReader
from post_training.schemas import record as names
from post_training.tracking import JobRun, Tracking, TrackingServer
from tests.mlflow_server import MLflowServer


@pytest.fixture
def tracking(mlflow_server: MLflowServer) -> Tracking:
    return Tracking(TrackingServer(mlflow_server.uri))


@pytest.fixture
def reader(tracking: Tracking) -> RunReader:
    return RunReader(tracking)


def create(tracking: Tracking, job_uuid: str, **tags: str) -> JobRun:
    return tracking.create_run(
        name=job_uuid,
        experiment=None,
        tags={names.TAG_JOB_UUID: job_uuid, **tags},
        params={"model": "org/model"},
        request={"job_uuid": job_uuid, "model": "org/model"},
    )


def test_runs_are_found_by_their_ids_and_what_is_no_id_is_not(tracking: Tracking, reader: RunReader) -> None:
    made = [create(tracking, f"by-id-{number}") for number in range(3)]
    wanted = [run.run_id for run in made[:2]]
    found = reader.by_id([*wanted, "0" * 32, "' OR 1 = 1 --", ""])
    assert {run.run_id for run in found} == set(wanted)
    assert found[0].params == {"model": "org/model"}
    assert reader.by_id([]) == []


def test_runs_of_a_dag_are_found_by_their_time(tracking: Tracking, reader: RunReader) -> None:
    made = create(tracking, "of-dag", **{names.TAG_DAG_ID: "team.nightly"})
    create(tracking, "a-trial", **{names.TAG_DAG_ID: "team.nightly", names.TAG_STAGE: "digest"})
    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    assert [run.run_id for run in reader.of_dag("team.nightly", now - hour, now + hour)] == [made.run_id]
    assert reader.of_dag("team.nightly", now - 2 * hour, now - hour) == []
    assert reader.of_dag("team.weekly", now - hour, now + hour) == []


def test_curves_come_by_step_the_later_attempts_value_first(
    tracking: Tracking, reader: RunReader, mlflow_server: MLflowServer
) -> None:
    client = MlflowClient(mlflow_server.uri)
    first, second = create(tracking, "curve-1"), create(tracking, "curve-2")
    points = [(1, 3.0, 10), (2, 2.5, 20), (3, math.nan, 30), (2, 2.0, 40), (4, 1.0, 50)]
    client.log_batch(
        first.run_id, metrics=[Metric("train_loss", value, moment, step) for step, value, moment in points]
    )
    curves = reader.curves([first.run_id, second.run_id], "train_loss", 100)
    assert curves == {first.run_id: ([1, 2, 4], [3.0, 2.0, 1.0])}


def test_a_long_curve_comes_with_few_points_and_both_ends(
    tracking: Tracking, reader: RunReader, mlflow_server: MLflowServer
) -> None:
    client = MlflowClient(mlflow_server.uri)
    run = create(tracking, "curve-long")
    client.log_batch(
        run.run_id, metrics=[Metric("train_loss", 1 / step, step, step) for step in range(1, 801)]
    )
    steps, _ = reader.curves([run.run_id], "train_loss", 40)[run.run_id]
    assert 20 <= len(steps) <= 42
    assert (steps[0], steps[-1]) == (1, 800)


def test_the_request_is_what_the_run_was_made_for(tracking: Tracking, reader: RunReader) -> None:
    run = create(tracking, "requested")
    assert reader.request(run) == {"job_uuid": "requested", "model": "org/model"}


def test_an_outage_is_one_error() -> None:
    reader: Any = RunReader(Tracking(TrackingServer("http://127.0.0.1:9")))
    for call in (
        lambda: reader.by_id(["0" * 32]),
        lambda: reader.curves(["0" * 32], "train_loss", 10),
    ):
        with pytest.raises(RecordUnavailableError):
            call()
