"""Runs of tasks that are no jobs, on a real MLflow server."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

from post_training.errors import DataError, RecordUnavailableError
from post_training.job_ids import TaskKey
from post_training.schemas import record as names
from post_training.stage_runs import StageRuns
from post_training.tracking import Tracking, TrackingServer
from tests.mlflow_server import MLflowServer

COLUMNS = ["gate", "value", "passed"]


@pytest.fixture
def tracking(mlflow_server: MLflowServer) -> Tracking:
    return Tracking(TrackingServer(mlflow_server.uri, deployment="http://here"))


@pytest.fixture
def runs(tracking: Tracking) -> StageRuns:
    return StageRuns(tracking)


@pytest.fixture
def client(mlflow_server: MLflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.uri)


@pytest.fixture
def key() -> TaskKey:
    """A task that has no run yet."""
    return TaskKey("nightly", f"scheduled__{uuid4().hex}", "evaluate")


def test_a_new_run_says_whose_it_is(runs: StageRuns, client: MlflowClient, key: TaskKey) -> None:
    parent = runs.open(key)
    run = runs.open(replace(key, task_id="gate"), experiment="nights", parent=parent.run_id, name="the gate")
    assert (run.status, run.ended_at) == ("RUNNING", None)
    stored = client.get_run(run.run_id)
    assert stored.info.run_name == "the gate"
    assert client.get_experiment(stored.info.experiment_id).name == "nights"
    assert (
        stored.data.tags.items()
        >= {
            names.TAG_DAG_ID: "nightly",
            names.TAG_RUN_ID: key.run_id,
            names.TAG_TASK_ID: "gate",
            names.TAG_MAP_INDEX: "-1",
            names.TAG_DEPLOYMENT: "http://here",
            "mlflow.parentRunId": parent.run_id,
        }.items()
    )
    assert names.TAG_PARENT_RUN not in parent.tags
    assert client.get_run(parent.run_id).info.run_name == f"nightly.{key.run_id}.evaluate"
    assert client.get_experiment(parent.experiment_id).name == "post-training"


def test_parts_of_a_tasks_work_have_runs_of_their_own(runs: StageRuns, key: TaskKey) -> None:
    whole, first = runs.open(key), runs.open(key, part="trial 1", further={"team": "a"})
    assert len({whole.run_id, first.run_id, runs.open(key, part="trial 2").run_id}) == 3
    assert first.tags["team"] == "a"
    assert runs.open(key, part="trial 1").run_id == first.run_id
    assert runs.open(key).run_id == whole.run_id


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED", "FAILED"])
def test_a_later_attempt_goes_on_with_the_run(
    runs: StageRuns, tracking: Tracking, client: MlflowClient, key: TaskKey, status: str
) -> None:
    first = runs.open(key)
    tracking.set_status(first.run_id, status, error="No memory." if status == "FAILED" else None)
    again = runs.open(key, experiment="of another name")
    assert (again.run_id, again.status, again.ended_at) == (first.run_id, "RUNNING", None)
    assert names.TAG_ERROR not in again.tags
    assert tracking.get(first.run_id) == again
    assert client.get_run(first.run_id).info.status == "RUNNING"


def test_a_run_that_somebody_deleted_is_made_anew(
    runs: StageRuns, client: MlflowClient, key: TaskKey
) -> None:
    first = runs.open(key)
    client.delete_run(first.run_id)
    assert runs.open(key).run_id != first.run_id


@pytest.mark.parametrize(
    "other",
    [{"dag_id": "nightly.a"}, {"run_id": "manual"}, {"task_id": "gate"}, {"map_index": 0}],
    ids=lambda other: next(iter(other)),
)
def test_each_task_has_its_own(runs: StageRuns, key: TaskKey, other: dict[str, Any]) -> None:
    assert runs.open(key).run_id != runs.open(replace(key, **other)).run_id


@pytest.mark.parametrize(
    "run_id",
    [
        "it's",
        'say "x"',
        "manual__2026-11-28T00:00:00+00:00",
        "a`b",
        "100%_\\",
        "' OR '1'='1",
        "Nächte 夜",
        "x" * 250,
    ],
)
def test_whatever_the_dag_run_is_called(runs: StageRuns, run_id: str) -> None:
    key = TaskKey(f"nightly-{uuid4().hex}", run_id, "evaluate")
    first = runs.open(key)
    assert first.tags[names.TAG_RUN_ID] == run_id
    assert runs.open(key).run_id == first.run_id
    child = runs.open(replace(key, task_id="gate"), parent=first.run_id)
    assert [run.run_id for run in runs.children(first.run_id)] == [child.run_id]


def test_deployments_do_not_see_each_others(runs: StageRuns, tracking: Tracking, key: TaskKey) -> None:
    there = StageRuns(Tracking(replace(tracking.server, deployment="http://there")))
    ours, theirs = runs.open(key), there.open(key)
    assert ours.run_id != theirs.run_id
    child = replace(key, task_id="gate")
    below = there.open(child, parent=ours.run_id)
    assert runs.open(key).run_id == ours.run_id
    assert there.open(key).run_id == theirs.run_id
    assert runs.children(ours.run_id) == []
    assert [run.run_id for run in there.children(ours.run_id)] == [below.run_id]


def test_children_are_listed_oldest_first(runs: StageRuns, key: TaskKey) -> None:
    parent = runs.open(key)
    made = []
    for index in range(3):
        made.append(runs.open(replace(key, task_id="part", map_index=index), parent=parent.run_id).run_id)
        time.sleep(0.002)  # MLflow's times are milliseconds
    assert [run.run_id for run in runs.children(parent.run_id)] == made
    assert runs.children(made[0]) == []


def test_it_is_no_job(runs: StageRuns, tracking: Tracking, key: TaskKey) -> None:
    runs.open(key)
    assert tracking.find(f"nightly.{key.run_id}.evaluate") is None


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED", "FAILED", "KILLED"])
def test_one_that_is_left_open_is_found_with_the_jobs(
    runs: StageRuns, tracking: Tracking, key: TaskKey, status: str
) -> None:
    run = runs.open(key)
    tracking.set_status(run.run_id, status)
    there = Tracking(replace(tracking.server, deployment="http://there"))
    long_ago = datetime.fromtimestamp(0, UTC)
    found, others = ([one.run_id for one in where.unsettled_runs(long_ago)] for where in (tracking, there))
    assert (run.run_id in found) is (status == "RUNNING")
    assert run.run_id not in others


def test_mlflow_reads_a_table_as_its_own(
    runs: StageRuns, client: MlflowClient, mlflow_server: MLflowServer, key: TaskKey
) -> None:
    run = runs.open(key)
    rows: list[list[Any]] = [["not worse", 0.5, True], ["faster", None, False], ["bad", math.nan, False]]
    runs.log_table(run.run_id, "gates.json", COLUMNS, rows)
    runs.log_table(run.run_id, "gates.json", COLUMNS, rows)
    runs.log_table(run.run_id, "more/parts.json", ["a"], [["b"]])
    content = json.loads(runs.read(run.run_id, "gates.json"))
    assert content == {"columns": COLUMNS, "data": [*rows[:2], ["bad", None, False]]}
    listed = json.loads(client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"])
    assert listed == [{"path": path, "type": "table"} for path in ("gates.json", "more/parts.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
        table = client.load_table(run.experiment_id, "gates.json", [run.run_id])
    assert list(table.columns) == COLUMNS
    assert table["gate"].tolist() == ["not worse", "faster", "bad"]


def test_our_tables_are_what_mlflow_writes(runs: StageRuns, client: MlflowClient, key: TaskKey) -> None:
    run = runs.open(key)
    runs.log_table(run.run_id, "ours.json", COLUMNS, [["speed", 0.5, True]])
    client.log_table(run.run_id, {"gate": ["speed"], "value": [0.5], "passed": [True]}, "theirs.json")
    ours, theirs = (json.loads(runs.read(run.run_id, file)) for file in ("ours.json", "theirs.json"))
    assert ours == theirs
    ours, theirs = json.loads(client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"])
    assert ours | {"path": "theirs.json"} == theirs


def test_metrics(runs: StageRuns, tracking: Tracking, key: TaskKey) -> None:
    run = runs.open(key)
    runs.log_metrics(run.run_id, {"candidate/perplexity": 2.5, "cost.gpu_seconds": 7})
    runs.log_metrics(run.run_id, {"cost.gpu_seconds": 8})
    found = tracking.get(run.run_id)
    assert found is not None
    assert found.metrics == {"candidate/perplexity": 2.5, "cost.gpu_seconds": 8}
    runs.log_metrics(run.run_id, {})


def test_a_file_is_read_as_it_is(runs: StageRuns, client: MlflowClient, key: TaskKey) -> None:
    run = runs.open(key)
    client.log_text(run.run_id, "1\r\nä", "v.txt")
    assert runs.read(run.run_id, "v.txt") == "1\r\nä".encode()
    for run_id, file in ((run.run_id, "nothing.json"), ("0" * 32, "v.txt")):
        with pytest.raises(DataError, match=f"the MLflow run '{run_id}' has no {file}"):
            runs.read(run_id, file)


@pytest.mark.parametrize(
    "call",
    [
        lambda runs: runs.open(TaskKey("nightly", "run", "evaluate")),
        lambda runs: runs.children("0" * 32),
        lambda runs: runs.log_table("0" * 32, "t.json", ["a"], [["b"]]),
        lambda runs: runs.log_metrics("0" * 32, {"a": 1.0}),
        lambda runs: runs.read("0" * 32, "t.json"),
    ],
    ids=["open", "children", "log_table", "log_metrics", "read"],
)
def test_mlflow_does_not_answer(call: Callable[[StageRuns], Any]) -> None:
    with pytest.raises(RecordUnavailableError, match=r"^MLflow does not answer$"):
        call(StageRuns(Tracking(TrackingServer("http://127.0.0.1:9"))))
