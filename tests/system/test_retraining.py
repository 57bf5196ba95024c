"""Nights of a scheduled retraining on the real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from mlflow.entities import Run

from tests.system.conftest import Deployment
from tests.waiting import wait_until

pytestmark = pytest.mark.system

NAME = "apples"


class Nights:
    """Starts nights, and reads what became of them."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.http = deployment.http()

    def write(self, file: str, numbers: range, answer: str) -> str:
        """Write a data set of questions and answers; return its name."""
        rows = [{"question": f"How many are {i} apples?", "answer": answer.format(i=i)} for i in numbers]
        (self.deployment.data / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return file

    def start(self, run_id: str, **conf: Any) -> None:
        """Trigger the DAG; the names in ``conf`` have two underscores for a dot."""
        body = {
            "dag_run_id": run_id,
            "logical_date": None,
            "conf": {name.replace("__", "."): value for name, value in conf.items()},
        }
        started = self.http.post("/api/v2/dags/scheduled_retraining/dagRuns", json=body)
        assert started.status_code == 200, started.text

    def wait(self, run_id: str) -> str:
        """Return the DAG run's state once it has ended."""

        def ended() -> str | None:
            answer = self.http.get(f"/api/v2/dags/scheduled_retraining/dagRuns/{run_id}")
            try:
                state = answer.raise_for_status().json()["state"]
            except httpx.HTTPStatusError:
                return None
            return state if state in ("success", "failed") else None

        return str(wait_until(ended))

    def run(self, run_id: str, **conf: Any) -> str:
        """Trigger the DAG and wait for its end."""
        self.start(run_id, **conf)
        return self.wait(run_id)

    def tasks(self, run_id: str, field: str = "state") -> dict[str, Any]:
        """The state of each task, or another field."""
        answer = self.http.get(f"/api/v2/dags/scheduled_retraining/dagRuns/{run_id}/taskInstances")
        return {task["task_id"]: task[field] for task in answer.json()["task_instances"]}

    def runs(self, run_id: str) -> tuple[Run, list[Run]]:
        """The night's MLflow run, and those below it."""
        client = self.deployment.mlflow
        experiments = [e.experiment_id for e in client.search_experiments()]
        (parent,) = client.search_runs(
            experiments, f"tags.`airflow.run_id` = '{run_id}' AND tags.`airflow.task_id` = 'prepare'"
        )
        return parent, self.below(parent)

    def below(self, parent: Run) -> list[Run]:
        """The MLflow runs that are shown below another."""
        client = self.deployment.mlflow
        experiments = [e.experiment_id for e in client.search_experiments()]
        return list(client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"))

    def aliases(self) -> dict[str, str]:
        """Which version is what."""
        return dict(self.deployment.mlflow.get_registered_model(NAME).aliases)

    def kill_first(self, program: str, place: str) -> None:
        """Kill the first process that runs a program in a night's folder, without a word to anyone."""

        def processes() -> list[psutil.Process]:
            return [
                process
                for process in psutil.process_iter(["cmdline"])
                if program in (line := process.info["cmdline"] or []) and any(place in part for part in line)
            ]

        wait_until(processes)[0].kill()


@pytest.fixture(scope="module")
def deployment(frail: Deployment) -> Deployment:
    return frail


@pytest.fixture(scope="module")
def nights(deployment: Deployment) -> Iterator[Nights]:
    nights = Nights(deployment)
    nights.write("heldout.jsonl", range(500, 524), "There are {i} apples.")
    with nights.http:
        yield nights


@pytest.fixture(scope="module")
def first(nights: Nights) -> str:
    """The first night, which has nothing to be compared with but the base model."""
    nights.write("night.jsonl", range(30), "There are {i} apples.")
    assert nights.run("night-1", quantize=None) == "success"
    return "night-1"


def test_the_first_night_promotes(nights: Nights, first: str) -> None:
    assert nights.tasks(first) == {
        "prepare": "success",
        "supervised_fine_tune": "success",
        "preference_optimize": "skipped",
        "quantize_plan": "skipped",
        "quantize_trials": "skipped",
        "quantize": "skipped",
        "evaluate": "success",
        "gate": "success",
        "approve": "skipped",
        "promote": "success",
        "conclude": "success",
    }
    assert nights.aliases() == {"champion": "1"}
    parent, below = nights.runs(first)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["post_training.decision"] == "promoted"
    assert "instead of the base model's" in parent.data.tags["post_training.reason"]
    assert {run.data.tags["airflow.task_id"] for run in below} == {"supervised_fine_tune", "evaluate"}
    assert parent.data.metrics["job_tokens"] > 0
    assert parent.data.metrics["device_seconds"] > 0
    version = nights.deployment.mlflow.get_model_version(NAME, "1")
    assert version.tags["post_training.retraining"] == parent.info.run_id
    assert version.tags["post_training.base_model"] == str(nights.deployment.model)


def test_a_clear_further_down_trains_nothing_again_and_promotes_nothing_twice(
    nights: Nights, first: str
) -> None:
    cleared = nights.http.post(
        "/api/v2/dags/scheduled_retraining/clearTaskInstances",
        json={
            "dry_run": False,
            "dag_run_id": first,
            "task_ids": ["evaluate"],
            "include_downstream": True,
            "only_failed": False,
        },
    )
    assert cleared.status_code == 200, cleared.text
    assert nights.wait(first) == "success"
    tries = nights.tasks(first, "try_number")
    assert (tries["supervised_fine_tune"], tries["evaluate"], tries["promote"]) == (1, 2, 2)
    assert nights.aliases() == {"champion": "1"}
    parent, below = nights.runs(first)
    assert parent.data.tags["post_training.decision"] == "promoted"
    assert len(below) == 2


def test_stages_that_were_left_out_are_no_jobs(nights: Nights, first: str) -> None:
    listed = {job.job_uuid for job in nights.deployment.client().post_training.job.list()}
    assert f"scheduled_retraining.{first}.supervised_fine_tune" in listed
    assert f"scheduled_retraining.{first}.quantize" not in listed


def test_a_night_without_new_data_is_skipped_with_a_reason(nights: Nights, first: str) -> None:
    assert nights.run("night-same", quantize=None) == "success"
    assert nights.tasks("night-same")["supervised_fine_tune"] == "skipped"
    parent, below = nights.runs("night-same")
    assert (parent.info.status, parent.data.tags["post_training.decision"]) == ("FINISHED", "skipped")
    assert parent.data.tags["post_training.reason"].startswith("No row of the data is new")
    assert below == []


def test_a_night_with_worse_data_changes_nothing(nights: Nights, first: str) -> None:
    nights.write("worse.jsonl", range(100, 130), "zq {i} xv zq!")
    assert nights.run("night-worse", data__dataset_id="worse.jsonl", quantize=None) == "success"
    states = nights.tasks("night-worse")
    assert (states["gate"], states["promote"]) == ("success", "skipped")
    assert nights.aliases() == {"champion": "1"}
    parent, _ = nights.runs("night-worse")
    assert parent.data.tags["post_training.decision"] == "rejected"
    assert "the champion's" in parent.data.tags["post_training.reason"]


def test_a_night_with_more_data_searches_and_promotes_whatever_is_killed(nights: Nights, first: str) -> None:
    nights.write("more.jsonl", range(80), "There are {i} apples.")
    nights.start("night-more", data__dataset_id="more.jsonl", model__start_from="champion")
    nights.kill_first("lightning_modules.train", "night-more/supervised_fine_tune")
    nights.kill_first("lightning_modules.train", "night-more/quantize_trials")
    nights.kill_first("lightning_modules.evaluate", "night-more")
    assert nights.wait("night-more") == "success"
    assert nights.aliases() == {"champion": "2", "previous": "1"}
    parent, below = nights.runs("night-more")
    assert parent.data.tags["post_training.decision"] == "promoted"
    jobs = {run.data.tags["airflow.task_id"]: run for run in below}
    assert set(jobs) == {"supervised_fine_tune", "quantize", "evaluate"}
    assert len(below) == 3
    assert {run.info.status for run in below} == {"FINISHED"}

    trials = nights.below(jobs["quantize"])
    assert [trial.info.status for trial in trials] == ["FINISHED"] * 2
    losses = {trial.info.run_id: trial.data.metrics["validation_loss"] for trial in trials}
    best = min(losses, key=lambda run_id: losses[run_id])
    assert jobs["quantize"].data.tags["post_training.best_trial_run"] == best
    models = nights.deployment.mlflow.search_logged_models(
        [parent.info.experiment_id], f"source_run_id = '{best}'"
    )
    version = nights.deployment.mlflow.get_model_version(NAME, "2")
    assert version.source in {f"models:/{model.model_id}" for model in models} | {
        model.artifact_location for model in models
    }
    searched = jobs["quantize"].data.metrics["search_device_seconds"]
    trained = jobs["supervised_fine_tune"].data.metrics["device_seconds"]
    assert parent.data.metrics["device_seconds"] >= searched + trained
