"""The services of docker/compose.yaml as processes: PostgreSQL, Redis, two Celery workers with a home each.

A worker stands for a machine: it is lost with all that runs on it, while jobs train and wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg2
import pytest
from mlflow import MlflowClient

from benchmarks.growth import Servers, check_copies
from benchmarks.seeding import pattern_of
from cluster.cluster import Cluster
from post_training.schemas.record import METRIC_TRAIN_LOSS
from tests.requests_of import OPTIMIZER
from tests.system.conftest import Deployment, home_of, write_data
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(1800),  # the first test starts a dozen servers on two cores
]

PATHS = "/post-training/v1/post-training"
DAG_ID = "supervised_fine_tune"
WORKERS = ("worker-cpu-1", "worker-cpu-2")
EPOCHS, STEPS = 3, 120
RATES = [1e-5, 1e-3, 1e-2]


@dataclass
class Clustered(Deployment):
    """A cluster, as other tests use their servers, and what only a cluster has."""

    servers: Cluster  # type: ignore[assignment]

    @property
    def mlflow(self) -> MlflowClient:
        login = f"admin:{self.servers.secret('mlflow', 'admin_password')}@"
        return MlflowClient(self.servers.mlflow_url.replace("//", f"//{login}"))

    def worker_of(self, job_uuid: str) -> str:
        """The worker that has the newest attempt at a job."""
        address = self.task(job_uuid)["hostname"]
        return next(name for name in WORKERS if self.servers.replicas[name].address == address)

    def home(self, worker: str) -> Path:
        """A worker's ``[post_training] home``."""
        return self.servers.replicas[worker].volumes["/var/lib/post-training"]

    def long_body(self, job_uuid: str) -> dict[str, Any]:
        """A request of ``STEPS`` short steps in each of ``EPOCHS``."""
        body = self.body(job_uuid, n_epochs=EPOCHS, max_steps_per_epoch=STEPS)
        body["training_config"]["data_config"]["dataset_id"] = str(self.data / "long.jsonl")
        return body


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clustered]:
    folder = home_of(tmp_path_factory, "cluster")
    data = folder / "data"
    model = write_data(data)
    (data / "long.jsonl").write_text((data / "train.jsonl").read_text() * (STEPS // 6 + 1))
    variables = {
        "DATA": str(data),
        "AIRFLOW_USERS": "admin:admin,viewer:viewer",
        "API_WORKERS": "2",
        "CPU_WORKERS": "2",
        "HEARTBEAT_TIMEOUT": "120",
        "MLFLOW_WORKERS": "1",
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # more only wait for each other on a model of this size
        with Cluster(folder / "home", variables=variables, timeout=1200) as cluster:
            deployment = Clustered(cluster, model, data)
            with deployment.http() as http:
                for dag_id in (DAG_ID, f"{DAG_ID}_search"):
                    wait_until(lambda dag_id=dag_id: http.get(f"/api/v2/dags/{dag_id}").is_success)
            yield deployment


def test_a_job_whose_worker_is_lost_goes_on_on_the_other_from_mlflows_state(deployment: Clustered) -> None:
    client = deployment.client()
    for job_uuid in ("lost", "kept"):
        client.post_training.supervised_fine_tune(**deployment.long_body(job_uuid))
    running = wait_until(lambda: _both_run(deployment, "lost", "kept"))
    for job_uuid in ("waiting", "unwanted"):
        client.post_training.supervised_fine_tune(**deployment.body(job_uuid))
    assert {*running.values()} == {*WORKERS}
    survivor = running["kept"]
    stored = wait_until(lambda: deployment.stored_step("lost"))
    folder = Path("jobs", DAG_ID, "lost")
    assert (deployment.home(running["lost"]) / folder).exists()
    assert not (deployment.home(survivor) / folder).exists()
    deployment.servers.kill(running["lost"])

    wait_until(lambda: deployment.task("unwanted")["state"] == "queued")
    client.post_training.job.cancel(job_uuid="unwanted")
    for job_uuid in ("kept", "waiting", "lost"):
        assert deployment.wait(job_uuid).status == "completed"
    tries = {job_uuid: deployment.task(job_uuid)["try_number"] for job_uuid in ("lost", "kept", "waiting")}
    assert tries == {"lost": 2, "kept": 1, "waiting": 1}
    assert deployment.worker_of("lost") == survivor
    assert len(client.post_training.job.artifacts(job_uuid="lost").checkpoints) == EPOCHS
    _assert_it_went_on(deployment, stored)
    assert client.post_training.job.status(job_uuid="unwanted").status == "cancelled"
    unwanted = deployment.task("unwanted")
    assert (unwanted["state"], unwanted["hostname"]) == ("skipped", "")  # no worker ever began it


def _both_run(deployment: Clustered, *jobs: str) -> dict[str, str]:
    states = {job_uuid: deployment.task(job_uuid)["state"] for job_uuid in jobs}
    if {*states.values()} != {"running"}:
        return {}
    return {job_uuid: deployment.worker_of(job_uuid) for job_uuid in jobs}


def _assert_it_went_on(deployment: Clustered, stored: int) -> None:
    """Its second attempt began behind the state, and each step is in the record once.

    :param stored: step of a state that MLflow held when the worker was lost.
    """
    assert 0 < stored < EPOCHS * STEPS
    (run,) = deployment.runs_of("lost")
    steps = [point.step for point in deployment.mlflow.get_metric_history(run.info.run_id, METRIC_TRAIN_LOSS)]
    assert steps == list(range(1, EPOCHS * STEPS + 1))
    lines = deployment.log("lost")
    (went_on,) = [number for number, line in enumerate(lines) if "attempt 2 goes on from" in line]
    progress = [line for line in lines[went_on:] if line.startswith("progress step")]
    assert all(int(line.split()[2].partition("/")[0]) > stored for line in progress)
    tokens = run.data.metrics
    assert tokens["job_tokens"] < tokens["tokens_seen"] * (2 - stored / (EPOCHS * STEPS))


def test_a_workers_log_is_asked_for_where_it_is(deployment: Clustered) -> None:
    """The api-server sees the disk of the first worker alone."""
    survivor = deployment.worker_of("lost")
    deployment.servers.start_again(next(name for name in WORKERS if name != survivor))
    jobs = ("log-1", "log-2")  # at once: each worker has one slot
    for job_uuid in jobs:
        deployment.client().post_training.supervised_fine_tune(**deployment.body(job_uuid))
    workers = {}
    for job_uuid in jobs:
        assert deployment.wait(job_uuid).status == "completed"
        workers[deployment.worker_of(job_uuid)] = job_uuid
    lines = deployment.log(workers[WORKERS[1]])
    assert any("progress step 6/6" in line for line in lines), lines


def test_a_running_job_is_cancelled_on_its_worker(deployment: Clustered) -> None:
    client = deployment.client()
    client.post_training.supervised_fine_tune(**deployment.long_body("stopped"))
    wait_until(lambda: any(line.startswith("progress") for line in deployment.log("stopped")))
    client.post_training.job.cancel(job_uuid="stopped")
    assert deployment.wait("stopped").status == "cancelled"
    wait_until(lambda: deployment.task("stopped")["state"] == "failed")
    (run,) = deployment.runs_of("stopped")
    assert run.info.status == "KILLED"


def test_the_same_submit_through_several_api_servers_is_one_job(deployment: Clustered) -> None:
    def submit(_: int) -> int:
        with deployment.http() as http:  # a connection of its own: the kernel spreads them over the processes
            return http.post(f"{PATHS}/supervised-fine-tune", json=deployment.body("same")).status_code

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(submit, range(6)))
    assert {*answers} <= {200, 503}  # 503 says when to ask again
    assert 200 in answers
    assert deployment.wait("same").status == "completed"
    assert len(deployment.runs_of("same")) == 1


def test_a_search_runs_on_both_workers_with_its_study_in_postgresql(deployment: Clustered) -> None:
    body = deployment.body("searched", optimizer_config=OPTIMIZER)
    body["hyperparam_search_config"] = {
        "space": {"training_config.optimizer_config.lr": {"type": "categorical", "choices": RATES}},
        "sampler": "grid",
        "n_trials": 3,
        "max_parallel": 2,
    }
    deployment.client().post_training.supervised_fine_tune(**body)
    assert deployment.wait("searched").status == "completed"
    url = deployment.servers.secret("servers", "search_storage").replace("+psycopg2", "")
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        # Both workers may reach for the last trial at once: one that is made too many gets no values.
        cursor.execute("SELECT state, count(*) FROM trials WHERE number < 3 GROUP BY state")
        assert cursor.fetchall() == [("COMPLETE", 3)]
    with deployment.http() as http:
        found = http.get(f"/api/v2/dags/{DAG_ID}_search/dagRuns/searched/taskInstances/trials/listMapped")
    hosts = {task["hostname"] for task in found.raise_for_status().json()["task_instances"]}
    assert hosts == {deployment.servers.replicas[name].address for name in WORKERS}
    assert not any((deployment.home(name) / "searches.db").exists() for name in WORKERS)


def test_the_page_filters_what_postgresql_holds(deployment: Clustered) -> None:
    def shown(**wanted: str) -> set[str]:
        with deployment.http() as http:
            answer = http.get("/post-training/ui/data/jobs", params={"limit": "100", **wanted})
        return {job["job_uuid"] for job in answer.raise_for_status().json()["jobs"]}

    wait_until(lambda: not shown(status="in_progress"))  # the record is complete before its task has ended
    listed = {job.job_uuid for job in deployment.client().post_training.job.list()}
    assert {"lost", "kept", "waiting", "unwanted", "stopped", "same", "searched"} <= listed
    assert shown() == listed
    assert shown(status="cancelled") == {"unwanted", "stopped"}
    assert shown(status="in_progress") == shown(status="failed") == set()
    assert shown(text="LONG.jsonl") == {"lost", "kept", "stopped"}
    assert shown(text="dora") == set()


def test_copies_of_a_job_are_answered_as_the_job_is(deployment: Clustered) -> None:
    """What ``benchmarks.growth`` measures with is like what jobs leave."""
    servers = Servers.of(deployment.servers, deployment.model, deployment.data)
    pattern = pattern_of(servers.airflow, servers.mlflow, "log-1", "copied-")
    servers.copy(pattern, range(1, 4))
    with servers.client() as http:
        check_copies(http, pattern, 3)


def test_mlflow_and_airflow_ask_who_calls(deployment: Clustered) -> None:
    experiments = f"{deployment.servers.mlflow_url}/api/2.0/mlflow/experiments/search"
    assert httpx.post(experiments, json={"max_results": 1}, timeout=120).status_code == 401
    assert httpx.get(f"{deployment.servers.airflow_url}{PATHS}/jobs", timeout=120).status_code == 401
    with deployment.http("viewer") as http:
        answer = http.post(f"{PATHS}/supervised-fine-tune", json=deployment.body("forbidden"))
    assert answer.status_code == 403, answer.text


def test_the_record_is_reconciled_by_the_light_worker(deployment: Clustered) -> None:
    """Its task goes to another queue than trainings, and calls the API with the login from the secrets."""
    with deployment.http() as http:
        runs = "/api/v2/dags/reconcile/dagRuns"
        made = http.post(runs, json={"logical_date": None}).raise_for_status().json()["dag_run_id"]
        wait_until(lambda: http.get(f"{runs}/{made}").json()["state"] in ("success", "failed"))
        task = http.get(f"{runs}/{made}/taskInstances/reconcile").json()
    assert (task["state"], task["queue"]) == ("success", "default"), json.dumps(task)
    assert task["hostname"] == deployment.servers.replicas["worker-default"].address
