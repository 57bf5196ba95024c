"""Jobs that somebody stops: over HTTP and in Airflow's own pages, while they wait, train and finish."""

from __future__ import annotations

import llama_stack_client
import psutil
import pytest

from tests.system.conftest import Deployment, trainers_of
from tests.waiting import wait_until

pytestmark = pytest.mark.system

DAG = "/api/v2/dags/supervised_fine_tune"


def start_endless(deployment: Deployment, job_uuid: str) -> list[psutil.Process]:
    """Start a job that would train for hours, and return its trainer and its task once it trains."""
    body = deployment.body(job_uuid, n_epochs=100_000, max_steps_per_epoch=0, max_validation_steps=0)
    deployment.client().post_training.supervised_fine_tune(**body)
    wait_until(lambda: "train_loss" in metrics_of(deployment, job_uuid))
    (trainer,) = trainers_of(job_uuid)
    task = trainer.parent()
    assert task is not None
    return [trainer, task]


def metrics_of(deployment: Deployment, job_uuid: str) -> dict[str, float]:
    runs = deployment.runs_of(job_uuid)
    return dict(runs[0].data.metrics) if runs else {}


def status_in_mlflow(deployment: Deployment, job_uuid: str) -> str:
    (run,) = deployment.runs_of(job_uuid)
    return str(run.info.status)


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_cancelled(deployment: Deployment, job_uuid: str) -> None:
    """It is over, in every place, and stays so."""
    client = deployment.client()
    assert client.post_training.job.status(job_uuid=job_uuid).status == "cancelled"
    assert status_in_mlflow(deployment, job_uuid) == "KILLED"
    with pytest.raises(llama_stack_client.ConflictError, match="has ended: cancelled"):
        client.post_training.job.cancel(job_uuid=job_uuid)


def test_a_running_job_is_cancelled_for_good_and_keeps_its_checkpoints(deployment: Deployment) -> None:
    processes = start_endless(deployment, "cancelled")
    client = deployment.client()
    wait_until(lambda: client.post_training.job.artifacts(job_uuid="cancelled").checkpoints)
    client.post_training.job.cancel(job_uuid="cancelled")
    assert client.post_training.job.status(job_uuid="cancelled").status == "cancelled"
    wait_until(lambda: all(map(is_gone, processes)))
    assert_cancelled(deployment, "cancelled")
    kept = client.post_training.job.artifacts(job_uuid="cancelled").checkpoints
    assert [checkpoint["epoch"] for checkpoint in kept][:1] == [0]


def test_a_running_job_is_cancelled_by_marking_its_run_in_airflow(deployment: Deployment) -> None:
    processes = start_endless(deployment, "marked")
    with deployment.http() as http:
        http.patch(f"{DAG}/dagRuns/marked", json={"state": "failed"}).raise_for_status()
    # Nobody has asked for its status: Airflow's listener wrote it.
    wait_until(lambda: status_in_mlflow(deployment, "marked") == "KILLED")
    wait_until(lambda: all(map(is_gone, processes)))
    assert_cancelled(deployment, "marked")


def test_a_task_that_is_marked_as_success_before_its_end_is_no_completed_job(deployment: Deployment) -> None:
    processes = start_endless(deployment, "marked-success")
    with deployment.http() as http:
        http.patch(
            f"{DAG}/dagRuns/marked-success/taskInstances/train", json={"new_state": "success"}
        ).raise_for_status()
    wait_until(lambda: all(map(is_gone, processes)))
    assert_cancelled(deployment, "marked-success")


@pytest.mark.parametrize("how", ["http", "airflow"])
def test_a_job_that_waits_is_cancelled_and_never_starts(deployment: Deployment, how: str) -> None:
    job_uuid = f"waiting-{how}"
    with deployment.http() as http:
        with deployment.paused():
            client = deployment.client()
            client.post_training.supervised_fine_tune(**deployment.body(job_uuid))
            if how == "http":
                client.post_training.job.cancel(job_uuid=job_uuid)
            else:
                http.patch(f"{DAG}/dagRuns/{job_uuid}", json={"state": "failed"}).raise_for_status()
            assert_cancelled(deployment, job_uuid)
        task = http.get(f"{DAG}/dagRuns/{job_uuid}/taskInstances/train").json()
    assert task["state"] in ("failed", "skipped")
    assert trainers_of(job_uuid) == []


def test_a_cancelled_job_that_is_cleared_goes_on_in_the_same_run(deployment: Deployment) -> None:
    body = deployment.body("resumed", n_epochs=1, max_validation_steps=0)
    client = deployment.client()
    with deployment.paused():
        client.post_training.supervised_fine_tune(**body)
        client.post_training.job.cancel(job_uuid="resumed")
    with deployment.http() as http:
        clear = {"dry_run": False, "dag_run_id": "resumed", "only_failed": False}
        http.post(f"{DAG}/clearTaskInstances", json=clear).raise_for_status()
    assert client.post_training.job.status(job_uuid="resumed").status in ("scheduled", "in_progress")
    assert deployment.wait("resumed").status == "completed"
    assert status_in_mlflow(deployment, "resumed") == "FINISHED"


def test_a_job_whose_data_changed_meanwhile_is_trained_anew_in_a_run_of_its_own(
    deployment: Deployment,
) -> None:
    data = deployment.data / "changing.jsonl"
    rows = (deployment.data / "train.jsonl").read_text() * 12
    data.write_text(rows)
    body = deployment.body("changed", n_epochs=4, max_steps_per_epoch=60, max_validation_steps=0)
    body["training_config"]["data_config"]["dataset_id"] = str(data)
    client = deployment.client()
    client.post_training.supervised_fine_tune(**body)
    wait_until(lambda: "train_loss" in metrics_of(deployment, "changed"))
    (before,) = deployment.runs_of("changed")
    client.post_training.job.cancel(job_uuid="changed")
    wait_until(lambda: not trainers_of("changed"))
    data.write_text(rows[rows.index("\n") + 1 :])
    with deployment.http() as http:
        clear = {"dry_run": False, "dag_run_id": "changed", "only_failed": False}
        http.post(f"{DAG}/clearTaskInstances", json=clear).raise_for_status()
    status = deployment.wait("changed")
    assert status.status == "completed"
    (run,) = deployment.runs_of("changed")
    assert run.data.tags["post_training.supersedes"] == before.info.run_id
    history = deployment.mlflow.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == list(range(1, 241))
    assert {each.dataset.digest for each in run.inputs.dataset_inputs} != {
        each.dataset.digest for each in before.inputs.dataset_inputs
    }
    left = deployment.mlflow.get_run(before.info.run_id)
    assert (left.info.status, left.data.tags["post_training.job_uuid"]) == ("KILLED", "changed (superseded)")


def test_reconciling_mends_what_nobody_asks_for(deployment: Deployment) -> None:
    """A run that a submit left behind is young: it stays; a job of Airflow's own page has its end."""
    with deployment.http() as http:
        path = "/post-training/v1alpha/post-training/reconcile"
        counts = http.post(path).raise_for_status().json()
    assert counts.keys() == {"checked", "mended", "stopped", "failed", "discarded"}
    with deployment.http("viewer") as http:
        assert http.post(path).status_code == 403
