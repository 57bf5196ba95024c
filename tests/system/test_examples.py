"""The example DAGs of the docs, each run on the real servers: one trains, the others act on its job."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.system.conftest import ENDED, Deployment
from tests.waiting import wait_until

pytestmark = pytest.mark.system

RUN = "r1"
NAME = "examples"


class Examples:
    """Starts the examples, and reads what became of them."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def start(self, example: str, run_id: str = RUN, **conf: Any) -> None:
        """Switch the example's DAG on and trigger it."""
        dag = f"/api/v2/dags/example_{example}"
        wait_until(lambda: self._http.patch(dag, json={"is_paused": False}).is_success)
        body = {"dag_run_id": run_id, "conf": conf, "logical_date": None}
        self._http.post(f"{dag}/dagRuns", json=body).raise_for_status()

    def wait(self, example: str, run_id: str = RUN) -> str:
        """Return the state in which the run has ended."""
        path = f"/api/v2/dags/example_{example}/dagRuns/{run_id}"

        def ended() -> str | None:
            answer = self._http.get(path)
            state = answer.json()["state"] if answer.is_success else None
            return state if state in ("success", "failed") else None

        return str(wait_until(ended))

    def result(self, example: str, task_id: str, run_id: str = RUN) -> Any:
        """Return what a task of the example returned; wait for the example's success."""
        assert self.wait(example, run_id) == "success"
        task = f"/api/v2/dags/example_{example}/dagRuns/{run_id}/taskInstances/{task_id}"
        return self._http.get(f"{task}/xcomEntries/return_value").raise_for_status().json()["value"]

    def states(self, example: str, run_id: str = RUN) -> dict[str, str]:
        """Return the state of each task of the example, once it has ended."""
        self.wait(example, run_id)
        answer = self._http.get(f"/api/v2/dags/example_{example}/dagRuns/{run_id}/taskInstances")
        return {task["task_id"]: task["state"] for task in answer.json()["task_instances"]}


JOB = f"example_supervised_fine_tune.{RUN}.train"


@pytest.fixture(scope="module")
def examples(deployment: Deployment) -> Iterator[Examples]:
    """The examples; what needs no result of another has been started."""
    for file in ("train", "pairs"):
        shutil.copy(deployment.data / f"{file}.jsonl", deployment.data / f"example-{file}.jsonl")
    with deployment.http() as http:
        examples = Examples(http)
        trained = {"model": str(deployment.model), "dataset_id": "example-train.jsonl"}
        examples.start("supervised_fine_tune", **trained)
        examples.start("search_before", **trained, n_trials=2)
        yield examples


@pytest.fixture(scope="module")
def trained(examples: Examples) -> dict[str, Any]:
    """What the example that trains returned."""
    return dict(examples.result("supervised_fine_tune", "train"))


@pytest.fixture(scope="module")
def aligned(deployment: Deployment, examples: Examples, trained: dict[str, Any]) -> dict[str, Any]:
    """What the example that goes on from its checkpoint returned."""
    path = trained["checkpoints"][-1]["path"]
    examples.start("preference_optimize", finetuned_model=path, dataset_id="example-pairs.jsonl")
    return dict(examples.result("preference_optimize", "align"))


@pytest.fixture(scope="module")
def evaluated(deployment: Deployment, examples: Examples, trained: dict[str, Any]) -> dict[str, Any]:
    """What the example that measures the checkpoint returned."""
    examples.start(
        "evaluate",
        base=str(deployment.model),
        candidate=trained["checkpoints"][-1]["path"],
        dataset_id="example-train.jsonl",
    )
    return dict(examples.result("evaluate", "evaluate"))


def test_post_training_job_sensor(examples: Examples) -> None:
    examples.start("post_training_job_sensor", job_uuid=JOB)
    assert examples.wait("post_training_job_sensor") == "success"
    assert examples.wait("supervised_fine_tune") == "success"


def test_supervised_fine_tune(deployment: Deployment, trained: dict[str, Any]) -> None:
    assert trained["job_uuid"] == JOB
    (run,) = deployment.runs_of(JOB)
    assert (run.info.run_id, run.info.status) == (trained["mlflow_run_id"], "FINISHED")
    assert len(trained["checkpoints"]) == 1
    assert deployment.client().post_training.job.status(job_uuid=JOB).status == "completed"


def test_get_training_jobs(examples: Examples, trained: dict[str, Any]) -> None:
    examples.start("get_training_jobs")
    assert JOB in examples.result("get_training_jobs", "jobs")


def test_get_training_job_status(examples: Examples, trained: dict[str, Any]) -> None:
    examples.start("get_training_job_status", job_uuid=JOB)
    status = examples.result("get_training_job_status", "status")
    assert (status["status"], status["checkpoints"]) == ("completed", trained["checkpoints"])


def test_get_training_job_artifacts(examples: Examples, trained: dict[str, Any]) -> None:
    examples.start("get_training_job_artifacts", job_uuid=JOB)
    assert examples.result("get_training_job_artifacts", "checkpoints") == trained["checkpoints"]
    assert examples.result("get_training_job_artifacts", "best") == trained["checkpoints"][-1]["path"]


def test_cancel_training_job(deployment: Deployment, examples: Examples) -> None:
    client = deployment.client()
    client.post_training.supervised_fine_tune(**deployment.body("example-cancelled", n_epochs=100_000))
    examples.start("cancel_training_job", job_uuid="example-cancelled")
    assert examples.wait("cancel_training_job") == "success"
    assert deployment.wait("example-cancelled").status == "cancelled"


def test_reconcile_training_jobs(examples: Examples) -> None:
    examples.start("reconcile_training_jobs")
    found = examples.result("reconcile_training_jobs", "reconcile")
    assert set(found) == {"checked", "mended", "stopped", "failed", "discarded"}
    assert found["failed"] == 0


def test_search_before(deployment: Deployment, examples: Examples) -> None:
    found = examples.result("search_before", "train")
    assert found["job_uuid"] == f"example_search_before.{RUN}.train"
    (run,) = deployment.runs_of(found["job_uuid"])
    below = deployment.mlflow.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    assert [trial.info.status for trial in below] == ["FINISHED"] * 2
    assert run.data.tags["post_training.best_trial_run"] in {trial.info.run_id for trial in below}
    assert examples.states("search_before")["extract"] == "success"


def test_preference_optimize(deployment: Deployment, aligned: dict[str, Any]) -> None:
    (run,) = deployment.runs_of(aligned["job_uuid"])
    assert run.info.status == "FINISHED"
    assert "validation_rewards/accuracies" in aligned["metrics"]


def test_evaluate(trained: dict[str, Any], evaluated: dict[str, Any]) -> None:
    assert evaluated["models"]["candidate"] == trained["checkpoints"][-1]["path"]
    assert set(evaluated["metrics"]) == {"base", "candidate"}
    assert evaluated["metrics"]["candidate"]["loss"] < evaluated["metrics"]["base"]["loss"]


def test_gate(examples: Examples, evaluated: dict[str, Any]) -> None:
    examples.start("gate", evaluation_run_id=evaluated["mlflow_run_id"])
    assert examples.result("gate", "gate")["accepted"] is True
    assert examples.states("gate")["accepted"] == "success"


@pytest.fixture(scope="module")
def promoted(
    examples: Examples, trained: dict[str, Any], aligned: dict[str, Any]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Two jobs whose checkpoints became champions, one after the other, and what was returned of it."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for job in (trained, aligned):
        run_id = f"r{len(found)}"
        examples.start(
            "promote",
            run_id,
            registered_model=NAME,
            checkpoint=job["checkpoints"][-1]["path"],
            candidacy_run_id=job["mlflow_run_id"],
            compared_with=len(found),
        )
        found.append((job, examples.result("promote", "promote", run_id)))
    return found


def test_promote(promoted: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    assert [outcome for _, outcome in promoted] == [
        {"version": 1, "model_uri": f"models:/{NAME}/1", "replaces": None},
        {"version": 2, "model_uri": f"models:/{NAME}/2", "replaces": 1},
    ]


def test_rollback(
    deployment: Deployment, examples: Examples, promoted: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    assert deployment.mlflow.get_registered_model(NAME).aliases == {"champion": "2", "previous": "1"}
    examples.start("rollback", registered_model=NAME)
    assert examples.result("rollback", "rollback")["version"] == 1
    assert deployment.mlflow.get_registered_model(NAME).aliases["champion"] == "1"


def test_a_job_that_failed_fails_who_waits_for_it(deployment: Deployment, examples: Examples) -> None:
    """The sensor of the example, of a job that was cancelled."""
    assert deployment.client().post_training.job.status(job_uuid="example-cancelled").status in ENDED
    examples.start("post_training_job_sensor", "r2", job_uuid="example-cancelled")
    assert examples.wait("post_training_job_sensor", "r2") == "failed"
