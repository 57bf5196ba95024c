"""The DAGs behind HTTP and the form: they parse, and their params take every valid request."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

from post_training.schemas.flat import flatten, leaves
from post_training.schemas.requests import REQUESTS, SupervisedFineTuneRequest
from tests.requests_of import dpo_body, sft_body

DAGS = Path(__file__).resolve().parents[2] / "dags"
TYPED = {
    "supervised_fine_tune": {"training_config.data_config.dataset_id": "train.jsonl"},
    "preference_optimize": {
        "training_config.data_config.dataset_id": "train.jsonl",
        "finetuned_model": "org/model",
    },
}


@pytest.fixture(scope="module")
def dags() -> dict[str, DAG]:
    bag = DagBag(DAGS)
    assert bag.import_errors == {}
    return bag.dags


def conf_of(dag: DAG, conf: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's params are after this conf, validated as Airflow does."""
    params = copy.deepcopy(dag.params)
    params.update(conf)
    return params.validate()


def test_there_is_one_dag_a_method(dags: dict[str, DAG]) -> None:
    assert set(dags) == set(REQUESTS)


@pytest.mark.parametrize("dag_id", REQUESTS)
def test_a_dag_takes_runs_at_once_and_shows_its_fields(dags: dict[str, DAG], dag_id: str) -> None:
    dag = dags[dag_id]
    assert dag.is_paused_upon_creation is False
    assert set(dag.params) == set(leaves(REQUESTS[dag_id]))
    for path, param in dag.params.items():
        assert param.description, path
        assert param.schema["section"], path


@pytest.mark.parametrize("dag_id", REQUESTS)
def test_what_must_be_typed_is_asked_for(dags: dict[str, DAG], dag_id: str) -> None:
    with pytest.raises(Exception, match=r"dataset_id|finetuned_model|No value passed"):
        conf_of(dags[dag_id], {})
    assert conf_of(dags[dag_id], TYPED[dag_id])


@pytest.mark.parametrize(
    "body",
    [
        sft_body(),
        sft_body(algorithm_config=None),
        sft_body(algorithm_config={"type": "QAT", "quantizer_name": "x", "group_size": 32}),
        sft_body(runtime={"seed": 3, "save_total_limit": 2}, logger_config={"tags": {"a": "b"}}),
        sft_body(training_config__optimizer_config=None, training_config__max_steps_per_epoch=None),
        sft_body(
            training_config__optimizer_config={
                "optimizer_type": "sgd",
                "lr": 1e-3,
                "weight_decay": 0.1,
                "num_warmup_steps": 3,
            },
            training_config__efficiency_config={"enable_activation_checkpointing": True},
        ),
        dpo_body(),
        dpo_body(algorithm_config__reward_clip=5.0),
    ],
)
def test_every_valid_requests_conf_fits_the_params(dags: dict[str, DAG], body: dict[str, Any]) -> None:
    dag_id = "preference_optimize" if "finetuned_model" in body else "supervised_fine_tune"
    conf = flatten(REQUESTS[dag_id].model_validate(body))
    assert conf_of(dags[dag_id], conf) == conf


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training_config.n_epochs", 0),
        ("training_config.n_epochs", "two"),
        ("algorithm_config.rank", 0),
        ("training_config.dtype", "fp8"),
        ("training_config.data_config.data_format", "chat"),
        ("training_config.optimizer_config.lr", -1),
    ],
)
def test_the_form_refuses_what_the_schema_refuses(dags: dict[str, DAG], path: str, value: Any) -> None:
    with pytest.raises(Exception, match=rf"Invalid input for param {path}"):
        conf_of(dags["supervised_fine_tune"], {**TYPED["supervised_fine_tune"], path: value})


def test_the_schema_takes_what_the_form_shows(dags: dict[str, DAG]) -> None:
    from post_training.operators.params import FORM_DEFAULTS
    from post_training.schemas.flat import unflatten

    params = conf_of(dags["supervised_fine_tune"], TYPED["supervised_fine_tune"])
    nested = unflatten(SupervisedFineTuneRequest, params, form_defaults=FORM_DEFAULTS["supervised_fine_tune"])
    request = SupervisedFineTuneRequest.model_validate({"job_uuid": "job-1", **nested})
    assert request.training_config.optimizer_config is None
    assert request.runtime is None
