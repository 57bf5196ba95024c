"""A hyperparameter search on the real servers, asked for with the published client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mlflow.entities import Run
from playwright.sync_api import expect

from tests.requests_of import OPTIMIZER
from tests.system.browser import visiting
from tests.system.conftest import Deployment
from tests.waiting import wait_until

pytestmark = pytest.mark.system

LR = "training_config.optimizer_config.lr"
RATES = [1e-5, 1e-3, 1e-2]


def body_of(deployment: Deployment, job_uuid: str, **search: Any) -> dict[str, Any]:
    """A request whose trials differ in their learning rate."""
    body = deployment.body(job_uuid, optimizer_config=OPTIMIZER)
    body["training_config"]["data_config"]["dataset_id"] = "searched.jsonl"
    body["hyperparam_search_config"] = {
        "space": {LR: {"type": "categorical", "choices": RATES}},
        "sampler": "grid",
        "n_trials": 3,
        "max_parallel": 2,
        **search,
    }
    return body


def trials_of(deployment: Deployment, job_uuid: str) -> tuple[Run, list[Run]]:
    """The job's run, and those of its trials."""
    (job,) = deployment.runs_of(job_uuid)
    client = deployment.mlflow
    experiments = [e.experiment_id for e in client.search_experiments()]
    below = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{job.info.run_id}'")
    return job, list(below)


def processes_of(job_uuid: str) -> list[psutil.Process]:
    """The trainers of a job's trials."""
    wanted = f"/{job_uuid}/trials."
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(wanted in part and part.endswith("spec.json") for part in process.info["cmdline"] or ())
    ]


def tasks_of(http: httpx.Client, job_uuid: str) -> dict[tuple[str, int], dict[str, Any]]:
    answer = http.get(f"/api/v2/dags/supervised_fine_tune_search/dagRuns/{job_uuid}/taskInstances")
    return {(task["task_id"], task["map_index"]): task for task in answer.json()["task_instances"]}


def tokenized(deployment: Deployment) -> int:
    """How many data sets have been tokenized for jobs to come."""
    return len(list((deployment.servers.layout.home / "jobs" / "cache" / "tokenized").glob("*")))


@pytest.fixture(scope="module")
def deployment(frail: Deployment) -> Deployment:
    return frail


@pytest.fixture(scope="module")
def started(deployment: Deployment) -> int:
    """Ask for two searches, which go on beside each other; return what was tokenized before."""
    before = tokenized(deployment)
    for file, own in (("train.jsonl", "searched.jsonl"), ("pairs.jsonl", "searched-pairs.jsonl")):
        rows = (deployment.data / file).read_text().replace("apples", "plums")
        (deployment.data / own).write_text(rows)
    body = body_of(deployment, "search-1")
    answer = deployment.client().post_training.supervised_fine_tune(**body)
    assert answer.job_uuid == "search-1"
    with deployment.http() as http:
        http.post(
            "/post-training/v1/post-training/preference-optimize", json=body_of_pairs(deployment)
        ).raise_for_status()
    return before


def body_of_pairs(deployment: Deployment) -> dict[str, Any]:
    """A search over preference jobs that trains the best one anew."""
    body = body_of(deployment, "search-pairs", n_trials=2, max_parallel=1, use="retrain")
    body["finetuned_model"] = body.pop("model")
    body["runtime"] = {"adapter": body.pop("algorithm_config")}
    body["algorithm_config"] = {"beta": 0.1, "loss_type": "sigmoid"}
    body["training_config"]["data_config"]["dataset_id"] = "searched-pairs.jsonl"
    body["training_config"]["max_steps_per_epoch"] = 0
    return body


def test_the_best_of_three_trials_is_the_job(deployment: Deployment, started: int) -> None:
    client = deployment.client()
    seen = set()
    wait_until(
        lambda: (
            seen.add(client.post_training.job.status(job_uuid="search-1").status) or processes_of("search-1")
        )
    )
    assert client.post_training.job.status(job_uuid="search-1").status == "in_progress"
    assert seen <= {"scheduled", "in_progress"}
    processes_of("search-1")[0].parent().kill()  # a task; its trial goes on in the next attempt
    status = deployment.wait("search-1")
    assert status.status == "completed", status

    job, trials = trials_of(deployment, "search-1")
    assert sorted(float(trial.data.params[LR]) for trial in trials) == RATES
    assert {trial.info.status for trial in trials} == {"FINISHED"}
    losses = {trial.info.run_id: trial.data.metrics["validation_loss"] for trial in trials}
    best = min(losses, key=lambda run_id: losses[run_id])
    assert job.data.tags["post_training.best_trial_run"] == best
    models = deployment.mlflow.search_logged_models([job.info.experiment_id], f"source_run_id = '{best}'")
    artifacts = client.post_training.job.artifacts(job_uuid="search-1")
    assert {checkpoint["path"] for checkpoint in artifacts.checkpoints} == {
        f"models:/{model.model_id}" for model in models
    }
    assert [checkpoint["epoch"] for checkpoint in artifacts.checkpoints] == [0, 1]
    assert artifacts.checkpoints[-1]["training_metrics"]["validation_loss"] == pytest.approx(losses[best])
    assert artifacts.checkpoints[-1]["post_training_job_id"] == "search-1"
    files = {file.path for file in deployment.mlflow.list_artifacts(job.info.run_id, "search")}
    assert {"search/trials.json", "search/optimization_history.png"} <= files
    with deployment.http() as http:
        wait_until(lambda: tasks_of(http, "search-1")["train", -1]["state"] == "success")
        tasks = tasks_of(http, "search-1")
    assert {place: task["state"] for place, task in tasks.items()} == {
        ("plan", -1): "success",
        ("trials", 0): "success",
        ("trials", 1): "success",
        ("train", -1): "success",
    }
    assert sorted(tasks["trials", worker]["try_number"] for worker in (0, 1)) == [1, 2]
    listed = [job.job_uuid for job in client.post_training.job.list()]
    assert listed.count("search-1") == 1
    assert not any("trials" in job_uuid for job_uuid in listed)


def test_trials_of_pairs_share_the_references_and_the_best_values_are_trained_anew(
    deployment: Deployment, started: int
) -> None:
    status = deployment.wait("search-pairs")
    assert status.status == "completed", status
    job, trials = trials_of(deployment, "search-pairs")
    assert len(trials) == 2
    client = deployment.mlflow
    logs = [
        Path(client.download_artifacts(run.info.run_id, "logs/train-1.log")).read_text()
        for run in (*trials, job)
    ]
    assert sorted(log.count("computing the reference's log-probabilities") > 0 for log in logs) == [
        False,
        False,
        True,
    ]
    best = min(trials, key=lambda run: run.data.metrics["validation_loss"])
    assert job.data.params[LR] == best.data.params[LR]
    assert job.data.metrics["validation_loss"] == pytest.approx(best.data.metrics["validation_loss"])
    own = client.search_logged_models([job.info.experiment_id], f"source_run_id = '{job.info.run_id}'")
    assert {checkpoint["path"] for checkpoint in status.checkpoints} == {
        f"models:/{model.model_id}" for model in own
    }
    assert len(own) == 2


def test_trials_share_the_tokenized_data(deployment: Deployment, started: int) -> None:
    for job_uuid in ("search-1", "search-pairs"):
        assert deployment.wait(job_uuid).status == "completed"
    assert tokenized(deployment) == started + 2


def test_a_search_that_is_cancelled_ends_with_its_trials_and_goes_on_when_the_page_retries_it(
    deployment: Deployment, started: int
) -> None:
    client = deployment.client()
    space = {LR: {"type": "categorical", "choices": RATES[:2]}}
    body = body_of(deployment, "search-stopped", space=space, n_trials=2)
    body["training_config"]["n_epochs"] = 6
    client.post_training.supervised_fine_tune(**body)
    wait_until(lambda: len(processes_of("search-stopped")) == 2)
    client.post_training.job.cancel(job_uuid="search-stopped")
    assert client.post_training.job.status(job_uuid="search-stopped").status == "cancelled"
    wait_until(lambda: not processes_of("search-stopped"))
    assert client.post_training.job.status(job_uuid="search-stopped").status == "cancelled"
    assert "search-stopped" in [job.job_uuid for job in client.post_training.job.list()]
    job, stopped = trials_of(deployment, "search-stopped")
    assert job.info.status == "KILLED"

    with visiting(deployment) as visits, visits.page() as page:
        page.goto(visits.url("job?job_uuid=search-stopped"))
        page.get_by_role("button", name="Retry").click()
        expect(page.locator("#badge")).not_to_have_text("Cancelled")
        assert deployment.wait("search-stopped").status == "completed"
        expect(page.locator("#badge")).to_have_text("Completed")
        assert visits.problems == []
    job, trials = trials_of(deployment, "search-stopped")
    assert job.info.status == "FINISHED"
    assert {trial.info.run_id for trial in stopped} <= {trial.info.run_id for trial in trials}
    assert sorted(float(trial.data.params[LR]) for trial in trials) == RATES[:2]
    assert {trial.info.status for trial in trials} == {"FINISHED"}
