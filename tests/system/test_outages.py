"""Faults of what the real servers stand on: MLflow's disk is full, Airflow's database is locked."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.load import jobs
from lightning_modules.trained import TRAINED_FILE
from post_training.schemas.record import METRIC_TRAIN_LOSS
from post_training.standalone import DAG_IDS
from tests.system.conftest import CAN_MOUNT, Deployment
from tests.waiting import wait_until

pytestmark = pytest.mark.system

SUBMIT = "/post-training/v1/post-training/supervised-fine-tune"
EPOCHS, STEPS = 3, 80


def disk_of_mlflow(deployment: Deployment) -> Path:
    """MLflow's folder as its server sees it."""
    database = f"sqlite:///{deployment.servers.layout.home}/mlflow/mlflow.db"
    for process in psutil.process_iter(["cmdline"]):
        if database in (process.info["cmdline"] or ()):
            return Path(f"/proc/{process.pid}/root{deployment.servers.layout.home}/mlflow")
    raise AssertionError("MLflow does not run")


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold SQLite's one lock, so that nobody else writes."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fill the disk to its last byte; at the end there is room again."""
    ballast = disk / "ballast"
    try:
        # a transaction that goes on would free its journal's room when the disk is full
        with locked(disk / "mlflow.db"), ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert shutil.disk_usage(disk).free == 0
        yield
    finally:
        ballast.unlink()


def long_body(deployment: Deployment, job_uuid: str) -> dict[str, Any]:
    """A request of ``STEPS`` short steps in each of ``EPOCHS``."""
    rows = deployment.data / "long.jsonl"
    rows.write_text((deployment.data / "train.jsonl").read_text() * (STEPS // 6 + 1))
    body = deployment.body(job_uuid, n_epochs=EPOCHS, max_steps_per_epoch=STEPS)
    body["training_config"]["data_config"]["dataset_id"] = str(rows)
    return body


def steps(deployment: Deployment, job_uuid: str) -> list[int]:
    """The steps of which MLflow holds the loss, in its order."""
    runs = deployment.runs_of(job_uuid)
    return (
        [point.step for point in deployment.mlflow.get_metric_history(runs[0].info.run_id, METRIC_TRAIN_LOSS)]
        if runs
        else []
    )


@pytest.mark.skipif(not CAN_MOUNT, reason="the kernel lets this user mount nothing: there is no small disk")
def test_a_full_disk_of_mlflow_holds_up_the_record_alone(frail: Deployment) -> None:
    folder = frail.servers.layout.home / "jobs" / "jobs" / DAG_IDS[0] / "full"
    trained = folder / "train" / TRAINED_FILE
    with frail.http() as http:
        assert http.post(SUBMIT, json=long_body(frail, "full")).status_code == 200
        wait_until(lambda: steps(frail, "full"))
        with full(disk_of_mlflow(frail)):
            assert not trained.exists()
            before = jobs(frail.servers)
            answer = http.post(SUBMIT, json=frail.body("meanwhile"))
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["Retry-After"]) > 0
            assert jobs(frail.servers) == before
            wait_until(trained.exists)
            assert len(steps(frail, "full")) < EPOCHS * STEPS
            status = frail.client().post_training.job.status(job_uuid="full")
            assert status.status == "in_progress", status
        assert frail.wait("full").status == "completed"
        assert steps(frail, "full") == list(range(1, EPOCHS * STEPS + 1))
        artifacts = frail.client().post_training.job.artifacts(job_uuid="full")
        assert [checkpoint["epoch"] for checkpoint in artifacts.checkpoints] == list(range(EPOCHS))
        task = http.get("/api/v2/dags/supervised_fine_tune/dagRuns/full/taskInstances/train").json()
        assert task["try_number"] == 1
        assert http.post(SUBMIT, json=frail.body("meanwhile")).status_code == 200
    assert frail.wait("meanwhile").status == "completed"


def test_a_submit_while_airflows_database_is_locked_leaves_nothing_half_made(frail: Deployment) -> None:
    """Longer than SQLite waits for a lock by default, 5 s; what trains meanwhile loses nothing."""
    before = jobs(frail.servers)
    with frail.http() as http:
        assert http.post(SUBMIT, json=long_body(frail, "through")).status_code == 200
        wait_until(lambda: steps(frail, "through"))
        with locked(frail.servers.layout.home / "airflow" / "airflow.db"):
            answer = http.post(SUBMIT, json=frail.body("locked-out"))
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["Retry-After"]) > 0
        held = jobs(frail.servers)
        assert held.dag_runs - before.dag_runs == Counter(["through"])
        assert held.mlflow_runs - before.mlflow_runs == Counter(["through"])
        assert http.post(SUBMIT, json=frail.body("locked-out")).status_code == 200
    assert frail.wait("through").status == "completed"
    assert steps(frail, "through") == list(range(1, EPOCHS * STEPS + 1))
    assert frail.wait("locked-out").status == "completed"
