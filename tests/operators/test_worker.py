"""Where the tasks go that need a worker's devices."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk import DAG

from post_training.operators.jobs import ReconcileTrainingJobsOperator
from post_training.operators.search import search_before
from post_training.operators.training import SupervisedFineTuneOperator

SETTINGS = {"POOL": "gpus", "QUEUE": "gpu", "POD_TEMPLATE_FILE": "/templates/trainer.yaml"}
WHERE = ("pool", "queue", "executor_config")


def train(**fields: Any) -> SupervisedFineTuneOperator:
    return SupervisedFineTuneOperator(task_id="train", model="org/model", **fields)


def places(task: Any) -> tuple[Any, ...]:
    return tuple(getattr(task, name) for name in WHERE)


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(f"AIRFLOW__POST_TRAINING__{name}", value)


def test_without_settings_a_task_goes_where_all_go() -> None:
    assert places(train()) == ("default_pool", "default", {})


@pytest.mark.usefixtures("set_up")
def test_settings_say_where_trainings_and_their_searches_go() -> None:
    chosen = ("gpus", "gpu", {"pod_template_file": "/templates/trainer.yaml"})
    with DAG("nightly", schedule=None) as dag:
        search_before(train())
    assert places(dag.get_task("train")) == places(dag.get_task("plan")) == chosen
    trials = dag.get_task("trials").partial_kwargs
    assert tuple(trials[name] for name in WHERE) == chosen


@pytest.mark.usefixtures("set_up")
def test_a_task_may_say_it_itself() -> None:
    own = {"pool": "few", "queue": "large", "executor_config": {"pod_template_file": "/mine.yaml"}}
    assert places(train(**own)) == tuple(own.values())


@pytest.mark.usefixtures("set_up")
def test_light_tasks_stay_where_they_were() -> None:
    assert places(ReconcileTrainingJobsOperator(task_id="reconcile")) == ("default_pool", "default", {})
