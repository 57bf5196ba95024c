"""The real servers, a tiny model and its data, and the published client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from llama_stack_client import DefaultHttpxClient, LlamaStackClient
from mlflow import MlflowClient
from mlflow.entities import Run

from post_training.certificates import certificates
from post_training.schemas.record import TAG_RESUME_STATE
from post_training.schemas.trainer import StoredState
from post_training.standalone import DAG_IDS, Standalone
from tests.requests_of import PLAIN_END
from tests.tiny_model import write_tiny_model
from tests.waiting import PATIENCE, wait_until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENDED = ("completed", "failed", "cancelled")
# What is tested is that a task is tried again, not how long it waits for that: half a minute in our DAGs.
TASK_POLICY = """
from datetime import timedelta

def task_policy(task):
    task.retry_delay = timedelta(seconds=1)
"""
ON_A_SMALL_DISK = """#!/bin/sh
[ "$1" = mounted ] || exec unshare --map-root-user --mount "$0" mounted "$@"
shift
mount -t tmpfs -o size=64m tmpfs "{folder}"
cd "{folder}"
exec "{program}" "$@"
"""
CAN_MOUNT = not subprocess.run(
    ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
    capture_output=True,
    check=False,
).returncode
"""Whether this machine lets us give a process a small disk of its own."""


@dataclass
class Deployment:
    """Running servers, and what a client needs to use them."""

    servers: Standalone
    model: Path
    data: Path

    def client(self, user: str = "admin") -> LlamaStackClient:
        """The published client, logged in."""
        return LlamaStackClient(
            base_url=self.servers.service_url,
            api_key=self.servers.token(user),
            http_client=DefaultHttpxClient(verify=certificates()),
        )

    def http(self, user: str = "admin") -> httpx.Client:
        """Plain HTTP below Airflow's address, logged in."""
        headers = {"Authorization": f"Bearer {self.servers.token(user)}"}
        return httpx.Client(
            base_url=self.servers.airflow_url, headers=headers, timeout=120, verify=certificates()
        )

    @property
    def mlflow(self) -> MlflowClient:
        """MLflow's own client."""
        return MlflowClient(self.servers.mlflow_url)

    def runs_of(self, job_uuid: str) -> list[Run]:
        """The MLflow runs of a job."""
        experiments = [e.experiment_id for e in self.mlflow.search_experiments()]
        return list(self.mlflow.search_runs(experiments, f"tags.`post_training.job_uuid` = '{job_uuid}'"))

    def stored_step(self, job_uuid: str) -> int:
        """The step of the state that MLflow holds of a job; 0 where it holds none."""
        (run,) = self.runs_of(job_uuid)
        tag = run.data.tags.get(TAG_RESUME_STATE)
        return StoredState.model_validate_json(tag).step if tag else 0

    def task(
        self, job_uuid: str, task_id: str = "train", dag_id: str = "supervised_fine_tune"
    ) -> dict[str, Any]:
        """What Airflow knows of a job's task."""
        with self.http() as http:
            answer = http.get(f"/api/v2/dags/{dag_id}/dagRuns/{job_uuid}/taskInstances/{task_id}")
        return dict(answer.raise_for_status().json())

    def log(self, job_uuid: str) -> list[str]:
        """The lines of a job's log so far."""
        params = {"job_uuid": job_uuid, "limit": 10_000}
        with self.http() as http:
            answer = http.get("/post-training/v1/post-training/job/logs", params=params)
        return list(answer.raise_for_status().json()["log_lines"])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no job of ``supervised_fine_tune`` start meanwhile."""
        dag = "/api/v2/dags/supervised_fine_tune"
        with self.http() as http:
            http.patch(dag, json={"is_paused": True}).raise_for_status()
            try:
                yield
            finally:
                http.patch(dag, json={"is_paused": False}).raise_for_status()

    def body(self, job_uuid: str, **training: Any) -> dict[str, Any]:
        """A small LoRA request; ``training`` replaces fields of training_config."""
        config = {
            "n_epochs": 2,
            "max_steps_per_epoch": 3,
            "gradient_accumulation_steps": 1,
            "max_validation_steps": 2,
            "dtype": "fp32",
            "data_config": {
                "dataset_id": str(self.data / "train.jsonl"),
                "batch_size": 2,
                "shuffle": True,
                "data_format": "instruct",
            },
        }
        return {
            "job_uuid": job_uuid,
            "model": str(self.model),
            "training_config": config | training,
            "algorithm_config": {
                "type": "LoRA",
                "lora_attn_modules": ["q_proj", "v_proj"],
                "apply_lora_to_mlp": True,
                "apply_lora_to_output": False,
                "rank": 4,
                "alpha": 8,
            },
            "hyperparam_search_config": {},
            "logger_config": dict(PLAIN_END),
        }

    def wait(self, job_uuid: str, *statuses: str, seconds: float = PATIENCE) -> Any:
        """Return the job's status once it is one of these, by default any that ends; ``wait_until`` waits."""
        client = self.client()

        def reached() -> Any:
            status = client.post_training.job.status(job_uuid=job_uuid)
            if status.status in (statuses or ENDED):
                return status
            assert status.status not in ENDED, status
            return None

        return wait_until(reached, seconds)


def trainers_of(job_uuid: str) -> list[psutil.Process]:
    """The trainer processes of a job."""
    wanted = f"/{job_uuid}/train/spec.json"
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(wanted in part for part in process.info["cmdline"] or ())
    ]


def write_data(data: Path) -> Path:
    """Make a folder of data sets and of a tiny model; return the model's."""
    data.mkdir()
    rows = [{"question": f"How many are {i} apples?", "answer": f"There are {i} apples."} for i in range(12)]
    (data / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pairs = [
        {"prompt": row["question"], "chosen": row["answer"], "rejected": f"No idea, {i}."}
        for i, row in enumerate(rows)
    ]
    (data / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    (data / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"question": "?"}) + "\n")
    return write_tiny_model(data / "tiny-llama")


def deploy(home: Path, extra_env: Mapping[str, str] | None = None) -> Deployment:
    """Lay out a deployment whose servers do not run yet: our DAGs, a model, data.

    :param extra_env: see ``Standalone``.
    """
    shutil.copytree(ROOT / "dags", home / "dags")
    data = home / "data"
    model = write_data(data)
    policy = home / "airflow" / "config" / "airflow_local_settings.py"
    policy.parent.mkdir(parents=True)
    policy.write_text(TASK_POLICY)
    (home / "retraining.yaml").write_text((HERE / "retraining.yaml.txt").read_text().format(model=model))
    servers = Standalone(
        home,
        dags_folder=home / "dags",
        allowed_roots=[data],
        dag_ids=(*DAG_IDS, "scheduled_retraining"),
        users="admin:admin,viewer:viewer,user:user",
        extra_env={
            "AIRFLOW__POST_TRAINING__RETRAINING_CONFIG": str(home / "retraining.yaml"),
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",  # the DAGs stay as they are
            "OMP_NUM_THREADS": "1",  # more threads only wait for each other on a model of this size
            **(extra_env or {}),
        },
        timeout=1200,
    )
    return Deployment(servers, model, data)


def home_of(factory: pytest.TempPathFactory, name: str) -> Path:
    """Make the folder of servers that one of the workers of ``make test`` starts, for all its tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        (factory.getbasetemp().parent / name).mkdir()  # which fails in the second one
    return factory.mktemp(name)


NOBODY_DIES = {
    "AIRFLOW__DAG_PROCESSOR__HEALTH_CHECK_THRESHOLD": "300",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "300",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "300",
}
"""For servers that no test kills: a busy machine's pause is not their death, after which tasks begin anew."""

RUNNING = pytest.StashKey[ExitStack]()
"""The servers of the tests in this folder."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """End the servers with the last test of this folder: idle ones take a fifth of a core from all others."""
    yield
    if RUNNING in item.config.stash and (nextitem is None or not nextitem.path.is_relative_to(HERE)):
        item.config.stash[RUNNING].close()


@pytest.fixture(scope="session")
def running(pytestconfig: pytest.Config) -> Iterator[ExitStack]:
    """Ends the servers of all tests of this folder that this process runs."""
    with ExitStack() as stack:
        pytestconfig.stash[RUNNING] = stack
        yield stack


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory, running: ExitStack) -> Deployment:
    """Airflow and MLflow, running; beside our DAGs those of the docs, as a user would copy them."""
    heartbeats = {"AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "300"}  # nor does a task
    deployment = deploy(home_of(tmp_path_factory, "servers"), NOBODY_DIES | heartbeats)
    shutil.copytree(ROOT / "docs" / "examples", deployment.servers.layout.dags_folder / "examples")
    running.enter_context(deployment.servers)
    return deployment


@pytest.fixture(scope="session")
def frail(tmp_path_factory: pytest.TempPathFactory, running: ExitStack) -> Deployment:
    """Others, for what would break those, or takes so long that it should go on beside them.

    MLflow's disk has 64 MiB and ends with it.
    """
    home = home_of(tmp_path_factory, "frail")
    beside = Path(sys.executable).parent
    program = home / "bin" / "mlflow"
    program.parent.mkdir()
    program.write_text(ON_A_SMALL_DISK.format(folder=home / "mlflow", program=beside / "mlflow"))
    program.chmod(0o700)
    path = os.pathsep.join(map(str, (program.parent, beside, os.environ.get("PATH", os.defpath))))
    deployment = deploy(home, NOBODY_DIES | ({"PATH": path} if CAN_MOUNT else {}))
    running.enter_context(deployment.servers)
    return deployment
