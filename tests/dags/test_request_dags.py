"""The DAGs behind HTTP and the form: they parse, and their params take every valid request."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

from post_training.job_ids import REQUEST_DAGS, TaskKey
from post_training.operators.params import FORM_DEFAULTS, ORDER
from post_training.operators.search import PlanSearchOperator, SearchTrialsOperator
from post_training.operators.training import PreferenceOptimizeOperator, SupervisedFineTuneOperator
from post_training.schemas.flat import DEPLOYMENTS, flatten, leaves, unflatten
from post_training.schemas.requests import REQUESTS
from post_training.standalone import DAG_IDS
from tests.requests_of import LORA, QAT, dpo_body, sft_body

DAGS = Path(__file__).resolve().parents[2] / "dags"
OTHERS = {"reconcile", "scheduled_retraining", "rollback_model"}
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
    return {dag_id: dag for dag_id, dag in bag.dags.items() if dag_id in REQUEST_DAGS}


def conf_of(dag: DAG, conf: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's params are after this conf, validated as Airflow does."""
    params = copy.deepcopy(dag.params)
    params.update(conf)
    return params.validate()


def test_there_is_one_dag_a_method_and_one_that_searches(dags: dict[str, DAG]) -> None:
    assert set(dags) == REQUEST_DAGS == {path.stem for path in DAGS.glob("*.py")} - OTHERS
    assert set(DAG_IDS) == REQUEST_DAGS, "a standalone deployment switches them on"


@pytest.mark.parametrize("dag_id", sorted(REQUEST_DAGS))
def test_a_dag_takes_runs_at_once_and_shows_its_fields(dags: dict[str, DAG], dag_id: str) -> None:
    dag = dags[dag_id]
    assert dag.is_paused_upon_creation is False
    assert set(dag.params) == set(leaves(REQUESTS[dag_id.removesuffix("_search")]))


@pytest.mark.parametrize("dag_id", REQUESTS)
def test_what_must_be_typed_is_asked_for(dags: dict[str, DAG], dag_id: str) -> None:
    with pytest.raises(Exception, match=r"dataset_id|finetuned_model|No value passed"):
        conf_of(dags[dag_id], {})
    assert conf_of(dags[dag_id], TYPED[dag_id])


@pytest.mark.parametrize("method", REQUESTS)
def test_trials_come_before_the_job_whose_task_runs_whatever_became_of_some(
    dags: dict[str, DAG], method: str
) -> None:
    plain, searching = dags[method], dags[f"{method}_search"]
    assert plain.task_ids == ["train"]
    tasks = {task_id: searching.get_task(task_id) for task_id in searching.task_ids}
    assert {name: task.upstream_task_ids for name, task in tasks.items()} == {
        "plan": set(),
        "trials": {"plan"},
        "train": {"plan", "trials"},
    }
    assert tasks["train"].trigger_rule == "all_done_min_one_success"
    assert {task.retries for task in tasks.values()} == {5}
    assert tasks["trials"].operator_class is SearchTrialsOperator
    assert (tasks["plan"].method, tasks["trials"].partial_kwargs["method"]) == (method, method)
    assert type(tasks["train"]) is type(plain.get_task("train"))


@pytest.mark.parametrize("method", REQUESTS)
def test_the_form_of_a_search_shows_one_that_can_be_run(dags: dict[str, DAG], method: str) -> None:
    params = conf_of(dags[f"{method}_search"], TYPED[method])
    operator = PlanSearchOperator(task_id="plan", method=method, request=params)
    request = operator.build_request(TaskKey(f"{method}_search", "job-1", "train"))
    assert request.search is not None
    assert request.search.n_trials == 3


@pytest.mark.parametrize("body", [sft_body(), dpo_body(runtime={"adapter": LORA})])
def test_a_request_with_a_search_fits_the_params_of_its_dag(
    dags: dict[str, DAG], body: dict[str, Any]
) -> None:
    method = "preference_optimize" if "finetuned_model" in body else "supervised_fine_tune"
    space = {"training_config.n_epochs": {"type": "int", "low": 1, "high": 4}}
    body["hyperparam_search_config"] = {"space": space, "n_trials": 4, "pruner": "hyperband"}
    request = REQUESTS[method].model_validate(body)
    conf = flatten(request)
    assert conf_of(dags[f"{method}_search"], conf) == conf
    operator = PlanSearchOperator(task_id="plan", method=method, request=conf)
    built = operator.build_request(TaskKey(f"{method}_search", "job-1", "train"))
    assert built.payload_hash() == request.payload_hash()
    with pytest.raises(Exception, match="Invalid input for param hyperparam_search_config"):
        conf_of(dags[method], {**conf, "hyperparam_search_config": {"space": space, "trials": 4}})


@pytest.mark.parametrize(
    "body",
    [
        sft_body(),
        sft_body(algorithm_config=None),
        sft_body(algorithm_config=QAT),
        sft_body(algorithm_config=QAT | {"quantizer_name": "8da4w-qat"}, runtime={"adapter": LORA}),
        sft_body(runtime={"export": "merged"}, logger_config={"sample_prompts": ["Hello?"]}),
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
        dpo_body(runtime={"adapter": LORA, "reference_logprobs": "live", "export": "adapter"}),
        dpo_body(runtime={"adapter": LORA | {"use_dora": None}}),
        dpo_body(runtime={"adapter": None}),
    ],
)
def test_every_valid_requests_conf_fits_the_params(dags: dict[str, DAG], body: dict[str, Any]) -> None:
    dag_id = "preference_optimize" if "finetuned_model" in body else "supervised_fine_tune"
    conf = flatten(REQUESTS[dag_id].model_validate(body))
    assert conf_of(dags[dag_id], conf) == conf
    # What the task reads is what was sent, not the form's adapters or other defaults.
    again = PreferenceOptimizeOperator if dag_id == "preference_optimize" else SupervisedFineTuneOperator
    operator = again(task_id="again", request=conf_of(dags[dag_id], conf))
    request = operator.build_request(TaskKey(dag_id, "job-1", "train"))
    assert flatten(request) == conf
    assert request.payload_hash() == REQUESTS[dag_id].model_validate(body).payload_hash()


@pytest.mark.parametrize("dag_id", sorted(REQUEST_DAGS))
def test_what_every_job_is_asked_for_comes_first(dags: dict[str, DAG], dag_id: str) -> None:
    params = dags[dag_id].params
    sections = list(dict.fromkeys(params.get_param(path).schema["section"] for path in params))
    searched = ["Search"] if dag_id.endswith("_search") else []
    assert sections[: len(searched) + 3] == [*searched, "Model", "Data", "Training"]
    assert sorted(sections) == sorted(ORDER)


def test_adapters_have_a_section_of_their_own(dags: dict[str, DAG]) -> None:
    assert len(dags) == 4
    for dag in dags.values():
        sections = {path: param.schema["section"] for path, param in dag.params.items()}
        of_adapters = {path for path, section in sections.items() if section == "Adapters"}
        assert of_adapters == {path for path in sections if path.startswith("runtime.adapter.")}
        assert of_adapters
        assert dag.params.get_param("runtime.adapter.type").schema["enum"] == ["LoRA", DEPLOYMENTS, None]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("runtime.adapter.rank", 0),
        ("runtime.adapter.type", "QAT"),
        ("runtime.reference_logprobs", "cached"),
        ("algorithm_config.gamma", 2.0),
        ("algorithm_config.loss_type", "orpo"),
    ],
)
def test_the_preference_form_refuses_what_the_schema_refuses(
    dags: dict[str, DAG], path: str, value: Any
) -> None:
    with pytest.raises(Exception, match=rf"Invalid input for param {path}"):
        conf_of(dags["preference_optimize"], {**TYPED["preference_optimize"], path: value})


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


@pytest.mark.parametrize(
    ("dag_id", "said"), [("supervised_fine_tune", None), ("preference_optimize", {"adapter"})]
)
def test_the_schema_takes_what_the_form_shows(
    dags: dict[str, DAG], dag_id: str, said: set[str] | None
) -> None:
    params = conf_of(dags[dag_id], TYPED[dag_id])
    nested = unflatten(REQUESTS[dag_id], params, form_defaults=FORM_DEFAULTS[dag_id])
    request = REQUESTS[dag_id].model_validate({"job_uuid": "job-1", **nested})
    assert request.training_config.optimizer_config is None
    assert (request.runtime and request.runtime.model_fields_set) == said
    assert request.adapters is not None
    assert (request.adapters.rank, request.adapters.alpha) == (8, 16)
    assert request.adapters.lora_attn_modules == ["q_proj", "v_proj"]


def test_a_cleared_type_in_the_preference_form_trains_every_weight(dags: dict[str, DAG]) -> None:
    dag_id = "preference_optimize"
    params = conf_of(dags[dag_id], {**TYPED[dag_id], "runtime.adapter.type": None})
    nested = unflatten(REQUESTS[dag_id], params, form_defaults=FORM_DEFAULTS[dag_id])
    assert nested["runtime"] == {"adapter": None}
