"""Jobs on a real Ray cluster, whose nodes are processes without a common folder, as users have them.

Submitted over HTTP, started by Airflow's worker, followed by its triggerer, recorded in MLflow.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow.entities import Run

from post_training.schemas import record as names
from post_training.schemas.trainer import METRICS_FILE
from post_training.standalone_layout import LOOPBACK
from tests.ray_api import TOKEN
from tests.ray_cluster import HEADERS, RayCluster
from tests.system.conftest import Deployment, deploy, home_of
from tests.waiting import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]

NODES, BATCH, STEPS = 2, 2, 600
TRAINERS = ("RayTrainWorker", "lightning_modules.on_ray")
"""In the command of a job's processes on the cluster: that of a device, and the one that starts these."""


@pytest.fixture(scope="module")
def place() -> Iterator[socket.socket]:
    """Where the servers look for the cluster: who starts it closes this, which keeps others away."""
    with socket.socket() as place:
        place.bind((LOOPBACK, 0))
        yield place


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, place: socket.socket) -> Iterator[Deployment]:
    """Servers of its own, some of which are killed."""
    ray = {
        "AIRFLOW__POST_TRAINING__RAY_ADDRESS": f"http://{LOOPBACK}:{place.getsockname()[1]}",
        "AIRFLOW__POST_TRAINING__RAY_TOKEN": TOKEN,
        "AIRFLOW__POST_TRAINING__RAY_PATIENCE": "120",  # the start of a node, on a busy machine
    }
    deployment = deploy(home_of(tmp_path_factory, "on-ray"), ray)
    with deployment.servers:
        yield deployment


@pytest.fixture(scope="module")
def cluster(place: socket.socket) -> Iterator[RayCluster]:
    """A head and two nodes with a device each, where the servers look for it."""
    cluster = RayCluster(place.getsockname()[1])
    place.close()
    try:
        cluster.start()
        for name in ("one", "two"):
            cluster.add(name)
        yield cluster
    finally:
        cluster.stop()


@dataclass
class RayTraining:
    """A job, and where it is seen."""

    deployment: Deployment
    cluster: RayCluster
    job_uuid: str

    def submit(self, **runtime: Any) -> None:
        """Ask for a training of ``STEPS`` steps."""
        data = self.deployment.data / "ray.jsonl"
        rows = [
            {"question": f"How many are {i}?", "answer": f"There are {i}."}
            for i in range(NODES * BATCH * STEPS)
        ]
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        body = self.deployment.body(self.job_uuid, n_epochs=1, max_steps_per_epoch=0, max_validation_steps=0)
        body["training_config"]["data_config"] |= {"dataset_id": str(data), "batch_size": BATCH}
        usual = {"launcher": "ray", "num_nodes": NODES, "max_seq_length": 64, "save_every_n_steps": 10}
        self.deployment.client().post_training.supervised_fine_tune(
            **body, extra_body={"runtime": usual | runtime}
        )

    @property
    def run(self) -> Run:
        (run,) = self.deployment.runs_of(self.job_uuid)
        return run

    def step(self) -> int:
        """The step of the state that MLflow holds; 0 where it holds none."""
        return self.deployment.stored_step(self.job_uuid)

    def task(self) -> dict[str, Any]:
        """What Airflow knows of the job's task."""
        return self.deployment.task(self.job_uuid)

    def status(self) -> str:
        return str(self.deployment.client().post_training.job.status(job_uuid=self.job_uuid).status)

    def log(self) -> str:
        """The job's log so far."""
        return "\n".join(self.deployment.log(self.job_uuid))

    def on_ray(self) -> list[str]:
        """What the cluster says of each job that was submitted for this one, oldest first."""
        jobs = httpx.get(f"{self.cluster.address}/api/jobs/", headers=HEADERS, timeout=60)
        ours = [
            job
            for job in jobs.raise_for_status().json()
            if (job["submission_id"] or "").startswith(f"post-training-{self.run.info.run_id}-")
        ]
        return [job["status"] for job in sorted(ours, key=lambda job: job["start_time"])]

    def trainers(self) -> set[str]:
        """Which of ``TRAINERS`` run on the cluster."""
        commands = self.cluster.commands()
        return {name for name in TRAINERS if any(name in command for command in commands)}

    def left(self, node: str) -> list[Path]:
        """What a node holds of the job: a folder for each attempt, and in it one for each node."""
        return [*self.cluster.home(node).glob(f"ray/{self.run.info.run_id}/*/*")]

    def all_left(self) -> list[Path]:
        """What the nodes that run hold of it."""
        return [folder for node in self.cluster.nodes for folder in self.left(node)]

    def kill_first_node(self) -> None:
        """Kill the node of the process that records, which alone has the record's file."""
        (name,) = [
            name
            for name in self.cluster.nodes
            if any((folder / METRICS_FILE).exists() for folder in self.left(name))
        ]
        self.cluster.kill(name)


def test_a_job_with_more_nodes_than_the_cluster_has_is_refused(
    deployment: Deployment, cluster: RayCluster
) -> None:
    job = RayTraining(deployment, cluster, "too-many-nodes")
    job.submit(num_nodes=5)
    status = deployment.wait(job.job_uuid)
    nodes = len(cluster.nodes) - 1  # the head trains nothing
    error = f"runtime.num_nodes must be at most {nodes}, the Ray cluster's nodes with 1 CPU cores, got 5"
    assert status.status == "failed"
    assert error in status.error
    assert job.run.info.status == "FAILED"
    assert error in job.run.data.tags[names.TAG_ERROR]
    assert job.task()["try_number"] == 1
    assert job.on_ray() == ["FAILED"]


def test_a_job_that_is_cancelled_is_stopped_on_the_cluster(
    deployment: Deployment, cluster: RayCluster
) -> None:
    job = RayTraining(deployment, cluster, "cancelled-on-ray")
    job.submit(strategy="fsdp")
    wait_until(lambda: names.METRIC_TRAIN_LOSS in job.run.data.metrics)
    assert job.trainers() == {*TRAINERS}
    deployment.client().post_training.job.cancel(job_uuid=job.job_uuid)
    assert job.status() == "cancelled"
    wait_until(lambda: "the job on Ray was asked to end" in job.log())
    wait_until(lambda: not job.trainers())
    wait_until(lambda: job.on_ray() != ["RUNNING"])  # which Ray notices after they have gone
    (ended,) = job.on_ray()
    assert ended in ("STOPPED", "FAILED")  # by Airflow's triggerer, or by itself: it looks into MLflow, too
    assert (job.status(), job.run.info.status) == ("cancelled", "KILLED")
    wait_until(lambda: job.task()["state"] == "failed")


def test_a_job_outlives_servers_and_nodes(deployment: Deployment, cluster: RayCluster) -> None:
    """Airflow's servers are killed, and a node while another stands by; then one while there is none."""
    job, servers = RayTraining(deployment, cluster, "outlives"), deployment.servers
    cluster.add("spare")
    job.submit()
    wait_until(lambda: re.search(rf"progress step \d+/{STEPS}", job.log()))
    assert (job.task()["state"], job.status()) == ("deferred", "in_progress")
    wait_until(lambda: job.step() > 0)

    for name in ("triggerer", "scheduler"):
        servers.kill_server(name, session=True)
    job.kill_first_node()
    for name in ("triggerer", "scheduler"):
        servers.start_server(name)
    # Not for a state of the second round: its upload may come as late as the training's end.
    wait_until(lambda: "goes on from" in job.log())
    assert job.on_ray() == ["RUNNING"]

    job.kill_first_node()
    wait_until(lambda: job.on_ray()[0] == "FAILED")
    left_at = job.step()
    assert job.all_left() == []
    cluster.add("late")
    assert deployment.wait(job.job_uuid).status == "completed"

    assert job.on_ray() == ["FAILED", "SUCCEEDED"]
    assert job.task()["try_number"] == 2
    log = job.log()
    assert "nodes were lost while it trained: runtime.num_nodes must be at most 1" in log
    assert f"the state at step {left_at} comes from the record" in log
    run = job.run
    assert run.info.status == "FINISHED"
    history = deployment.mlflow.get_metric_history(run.info.run_id, names.METRIC_TRAIN_LOSS)
    assert sorted({point.step for point in history}) == list(range(1, STEPS + 1))
    (checkpoint,) = deployment.client().post_training.job.artifacts(job_uuid=job.job_uuid).checkpoints
    model = deployment.mlflow.get_logged_model(checkpoint["path"].removeprefix("models:/"))
    assert model.status.value == "READY"
    assert job.all_left() == []
