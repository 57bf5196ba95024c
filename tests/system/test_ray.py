"""Jobs on a real Ray cluster, whose nodes are processes without a common folder, over a real MLflow.

The operator is run as Airflow runs it: until it defers, its trigger, and what goes on then.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from mlflow import MlflowClient

from post_training.operators.on_ray import ray_jobs
from post_training.operators.training import SupervisedFineTuneOperator
from post_training.operators.triggers import RayJobTrigger
from post_training.schemas import record as names
from post_training.schemas.trainer import METRICS_FILE
from post_training.tracking import Tracking, TrackingServer
from tests.mlflow_server import MLflowServer
from tests.operators.conftest import connect
from tests.operators.workplace import Workplace
from tests.ray_api import TOKEN
from tests.ray_cluster import RayCluster
from tests.requests_of import LORA
from tests.system.conftest import TAKES_LONG
from tests.tiny_model import write_tiny_model
from tests.waiting import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500), TAKES_LONG]

NODES, BATCH, STEPS = 2, 2, 400
STARTS = 600.0
"""Seconds in which Ray has started whatever it starts, on a machine that does much else."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head and two nodes with a device each."""
    cluster = RayCluster()
    try:
        cluster.start()
        for name in ("one", "two"):
            cluster.add(name)
        yield cluster
    finally:
        cluster.stop()


class Place:
    """A deployment with that cluster and a real MLflow, and its newest job."""

    def __init__(
        self, workplace: Workplace, cluster: RayCluster, server: MLflowServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.workplace, self.cluster = workplace, cluster
        self.mlflow = MlflowClient(server.uri)
        self.tracking = Tracking(TrackingServer(server.uri))
        self.model = write_tiny_model(workplace.data.parent / "tiny")
        rows = [
            {"question": f"How many are {i}?", "answer": f"There are {i}."}
            for i in range(NODES * BATCH * STEPS)
        ]
        workplace.data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        connect(monkeypatch, host="http://airflow/post-training")
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_ADDRESS", cluster.address)
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_TOKEN", TOKEN)
        self.event: Any = None

    def operator(self, num_nodes: int = NODES) -> SupervisedFineTuneOperator:
        data = {
            "dataset_id": str(self.workplace.data),
            "batch_size": BATCH,
            "shuffle": True,
            "data_format": "instruct",
        }
        operator = SupervisedFineTuneOperator(
            task_id="train",
            model=str(self.model),
            algorithm_config=LORA,
            training_config={
                "n_epochs": 1,
                "max_steps_per_epoch": 0,
                "max_validation_steps": 0,
                "dtype": "fp32",
                "data_config": {**data, "shuffle": True},
            },
            logger_config={"sample_prompts": None},
            runtime={
                "launcher": "ray",
                "num_nodes": num_nodes,
                "max_seq_length": 64,
                "save_every_n_steps": 10,
            },
        )
        operator.tracking = self.tracking
        return operator

    def begin(self, attempt: int = 1, num_nodes: int = NODES) -> RayJobTrigger:
        """Run an attempt until it waits for its job on the cluster."""
        with pytest.raises(TaskDeferred) as deferred:
            self.operator(num_nodes).execute(self.context(attempt))
        trigger = deferred.value.trigger
        assert isinstance(trigger, RayJobTrigger)
        return trigger

    def follow(self, trigger: RayJobTrigger) -> threading.Thread:
        """Let a trigger wait, beside the test."""

        async def first_event() -> Any:
            return await anext(aiter(trigger.run()))

        def wait() -> None:
            self.event = asyncio.run(first_event()).payload

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def go_on(self, thread: threading.Thread, attempt: int = 1, num_nodes: int = NODES) -> dict[str, Any]:
        """Run what follows the trigger."""
        thread.join(STARTS)
        assert not thread.is_alive()
        return self.operator(num_nodes).execute_complete(self.context(attempt), self.event)

    def context(self, attempt: int) -> Any:
        return self.workplace.context(attempt=attempt, max_tries=2)

    @property
    def run(self) -> Any:
        found = self.mlflow.search_runs(
            [experiment.experiment_id for experiment in self.mlflow.search_experiments()],
            "tags.`post_training.job_uuid` = 'job-1'",
        )
        return found[0]

    def step(self) -> int:
        """The step of the state that MLflow holds; 0 where it holds none."""
        text = self.run.data.tags.get(names.TAG_RESUME_STATE)
        return int(json.loads(text)["step"]) if text else 0

    def first_node(self) -> str:
        """The node of the process that records: it alone has the record's file."""
        (name,) = [name for name in self.cluster.nodes if any(self.left(name).glob(f"*/*/{METRICS_FILE}"))]
        return name

    def left(self, node: str) -> Path:
        """The job's folder on a node, with a folder for each attempt."""
        return self.cluster.home(node) / "ray" / self.run.info.run_id

    def status(self, trigger: RayJobTrigger) -> str:
        """What the cluster says of a job."""
        job = ray_jobs().find(trigger.submission_id)
        assert job is not None
        return job.status

    def log(self, trigger: RayJobTrigger) -> str:
        """The output of a job."""
        return ray_jobs().log(trigger.submission_id)


@pytest.fixture
def place(
    workplace: Workplace, cluster: RayCluster, mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> Place:
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_PATIENCE", "60")
    return Place(workplace, cluster, mlflow_server, monkeypatch)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Settings of a deployment."""
    return Workplace(tmp_path, monkeypatch)


def test_a_job_with_more_nodes_than_the_cluster_has_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_PATIENCE", "1")
    thread = place.follow(place.begin(num_nodes=5))
    sentence = r"runtime\.num_nodes must be at most 2, the Ray cluster's nodes with 1 CPU cores, got 5"
    with pytest.raises(AirflowFailException, match=sentence):
        place.go_on(thread, num_nodes=5)
    assert place.run.info.status == "FAILED"
    assert "got 5" in place.run.data.tags[names.TAG_ERROR]


def test_a_job_is_stopped_on_the_cluster(place: Place) -> None:
    trigger = place.begin(num_nodes=5)
    thread = place.follow(trigger)
    wait_until(lambda: place.status(trigger) == "RUNNING", STARTS)
    asyncio.run(trigger.on_kill())
    thread.join(STARTS)
    assert place.event == {"status": "STOPPED", "error": None}
    with pytest.raises(AirflowException, match="ended as STOPPED without a result"):
        place.go_on(thread, num_nodes=5)


def test_a_job_goes_on_on_other_nodes_and_in_another_job(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node is killed while another stands by; then one while there is none: another job goes on later."""
    place.cluster.add("spare")
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_PATIENCE", "10")
    trigger = place.begin()
    thread = place.follow(trigger)
    wait_until(lambda: place.step() > 0, STARTS)

    place.cluster.kill(place.first_node())
    killed_at = place.step()
    wait_until(lambda: place.step() > killed_at + 10, STARTS)
    assert place.begin(attempt=2).submission_id == trigger.submission_id, (
        "the job of a lost worker is followed"
    )
    assert place.status(trigger) == "RUNNING"

    place.cluster.kill(place.first_node())
    thread.join(STARTS)
    assert "nodes were lost while it trained: runtime.num_nodes must be at most 1" in place.log(trigger)
    assert place.event == {"status": "FAILED", "error": None}
    assert [name for name in place.cluster.nodes if any(place.left(name).glob("*/*"))] == [], "all is removed"
    left_at = place.step()
    place.cluster.add("late")
    own = place.begin(attempt=2)
    assert own.submission_id != trigger.submission_id
    returned = place.go_on(place.follow(own), attempt=2)

    run = place.run
    assert (returned["mlflow_run_id"], run.info.status) == (run.info.run_id, "FINISHED")
    assert f"the state at step {left_at} comes from the record" in place.log(own)
    history = place.mlflow.get_metric_history(run.info.run_id, names.METRIC_TRAIN_LOSS)
    assert sorted({point.step for point in history}) == list(range(1, STEPS + 1))
    (checkpoint,) = returned["checkpoints"]
    assert checkpoint["path"].startswith("models:/")
    assert [name for name in place.cluster.nodes if any(place.left(name).glob("*/*"))] == []
    assert place.mlflow.get_logged_model(checkpoint["path"].removeprefix("models:/")).status.value == "READY"
