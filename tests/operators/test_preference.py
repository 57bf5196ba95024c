"""Preference optimization as a task, in both forms of its request; the trainer is a real process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException

from post_training.errors import InvalidRequestError
from post_training.job_ids import TaskKey
from post_training.operators.params import FORM_DEFAULTS
from post_training.operators.training import PreferenceOptimizeOperator
from post_training.schemas.algorithms import LoraFinetuningConfig
from post_training.schemas.flat import flatten
from post_training.schemas.requests import PreferenceOptimizeRequest
from post_training.schemas.rlhf import PostTrainingRLHFRequest
from tests.operators.workplace import PREFERENCE_KEY, RESULT, Workplace
from tests.requests_of import LORA, OPTIMIZER, dpo_body, rlhf_body


def test_a_preference_job_is_trained_and_recorded(workplace: Workplace) -> None:
    workplace.trains(
        "request = json.loads(spec.read_text())['request']\n"
        "print(request['finetuned_model'], request['algorithm_config']['beta'])\n"
        f"result = {RESULT!r}"
    )
    returned = workplace.preference().execute(workplace.context(PREFERENCE_KEY))
    assert (returned["job_uuid"], returned["metrics"]) == ("job-1", RESULT["metrics"])
    assert workplace.tracking.statuses == ["RUNNING", "FINISHED"]
    assert workplace.tracking.files == {"logs/train-1.log": "org/model 0.1\n"}
    assert workplace.tracking.runs["run-1"].tags["post_training.method"] == "preference_optimize"


def test_its_trainer_is_told_everything(workplace: Workplace) -> None:
    operator = workplace.preference(runtime={"adapter": LORA, "reference_logprobs": "live"})
    spec = workplace.spec_of(operator, PREFERENCE_KEY)
    assert isinstance(spec.request, PreferenceOptimizeRequest)
    assert spec.request.adapters == LoraFinetuningConfig.model_validate(LORA)
    assert spec.request.runtime is not None
    assert (spec.request.runtime.reference_logprobs, spec.request.runtime.seed) == ("live", 7)
    assert (spec.model, spec.model_roots) == ("org/model", (workplace.data.parent,))
    assert (spec.train_data, spec.checkpoint_dir) == (str(workplace.data), None)
    assert workplace.tracking.params["runtime.adapter.rank"] == 4


def test_a_refused_preference_job_has_a_record_that_says_why(workplace: Workplace) -> None:
    operator = workplace.preference(
        runtime={"reference_logprobs": "live"}, logger_config={"log_model": False}
    )
    with pytest.raises(
        AirflowFailException, match=r"runtime\.reference_logprobs: .*logger_config\.log_model: "
    ):
        operator.execute(workplace.context(PREFERENCE_KEY))
    (run,) = workplace.tracking.runs.values()
    assert (run.status, run.tags["post_training.method"]) == ("FAILED", "preference_optimize")
    assert "reference_logprobs" in run.tags["post_training.error"]


def test_the_form_as_it_is_shown_makes_a_request_with_adapters() -> None:
    typed = {"finetuned_model": "org/model", "training_config.data_config.dataset_id": "train.jsonl"}
    shown = {**FORM_DEFAULTS["preference_optimize"], **typed}
    request = PreferenceOptimizeOperator(task_id="train", request=shown).build_request(PREFERENCE_KEY)
    assert request.adapters == LoraFinetuningConfig(
        lora_attn_modules=["q_proj", "v_proj"],
        apply_lora_to_mlp=False,
        apply_lora_to_output=False,
        rank=8,
        alpha=16,
    )
    cleared = {**shown, "runtime.adapter.type": None}
    whole = PreferenceOptimizeOperator(task_id="train", request=cleared).build_request(PREFERENCE_KEY)
    assert whole.adapters is None
    assert whole.runtime is not None
    assert whole.runtime.model_fields_set == {"adapter"}


def rlhf(workplace: Workplace, **changes: Any) -> PreferenceOptimizeOperator:
    """Return the operator of a long form that names the workplace's data."""
    body = rlhf_body(validation_dataset_id="train.jsonl", **changes)
    return workplace.over_fakes(PreferenceOptimizeOperator.from_rlhf_request(body, task_id="train"))


def test_the_long_form_is_trained_as_the_short_one(workplace: Workplace) -> None:
    spec = workplace.spec_of(rlhf(workplace, runtime={"adapter": LORA}), PREFERENCE_KEY)
    assert isinstance(spec.request, PreferenceOptimizeRequest)
    assert (spec.model, spec.train_data) == ("org/model", str(workplace.data))
    assert spec.validation_data == str(workplace.data)
    config = spec.request.training_config
    assert config.optimizer_config is not None
    assert config.optimizer_config.model_dump(mode="json") == OPTIMIZER
    assert config.data_config is not None
    assert (config.data_config.batch_size, config.data_config.shuffle) == (4, True)
    assert spec.request.adapters == LoraFinetuningConfig.model_validate(LORA)


def test_the_long_form_is_validated_by_its_own_fields(workplace: Workplace) -> None:
    operator = rlhf(workplace, finetuned_model__uri="", algorithm="ppo")
    with pytest.raises(AirflowFailException, match=r"finetuned_model\.uri: .*; algorithm: .* got 'ppo'"):
        operator.execute(workplace.context(PREFERENCE_KEY))


def test_the_long_form_may_be_an_object_or_text() -> None:
    body = rlhf_body(runtime={"adapter": None})
    expected = PostTrainingRLHFRequest.model_validate(body).to_preference_optimize()
    for given in (body, PostTrainingRLHFRequest.model_validate(body), json.dumps(body)):
        operator = PreferenceOptimizeOperator.from_rlhf_request(given, task_id="train")
        request = operator.build_request(PREFERENCE_KEY)
        assert request == expected
        assert flatten(request) == flatten(expected)
        assert request.payload_hash() == expected.payload_hash()


def test_its_job_uuid_may_be_left_out_and_is_the_tasks_where_given() -> None:
    stage = TaskKey("nightly", "run-1", "dpo")
    left_out = PreferenceOptimizeOperator.from_rlhf_request(rlhf_body(job_uuid=...), task_id="dpo")
    assert left_out.build_request(stage).job_uuid == "nightly.run-1.dpo"
    given = PreferenceOptimizeOperator.from_rlhf_request(rlhf_body(), task_id="dpo")
    with pytest.raises(InvalidRequestError, match=r"job_uuid: must be left out or be 'nightly\.run-1\.dpo'"):
        given.build_request(stage)


def test_it_stands_beside_no_single_field(workplace: Workplace) -> None:
    operator = PreferenceOptimizeOperator.from_rlhf_request(
        rlhf_body(), task_id="train", finetuned_model="org/model"
    )
    with pytest.raises(InvalidRequestError, match="finetuned_model: was given beside request"):
        operator.build_request(PREFERENCE_KEY)


@pytest.mark.parametrize("native", [True, False])
def test_templates_in_the_long_form_are_rendered_in_a_dag(native: bool) -> None:
    body = rlhf_body(
        job_uuid="{{ run_id }}",
        finetuned_model__uri="models:/{{ var_of('name') }}/1",
        dataset_id="pairs/{{ ds }}.jsonl",
        validation_dataset_id="pairs/{{ ds }}-held-out.jsonl",
        optimizer_config__lr="{{ 1e-4 * 2 }}",
        training_config__n_epochs="{{ 1 + 1 }}",
        algorithm_config__beta="{{ 0.05 * 4 }}",
        logger_config={"tags": {"day": "{{ ds }}"}},
    )
    with DAG("preference_optimize", render_template_as_native_obj=native) as dag:
        operator = PreferenceOptimizeOperator.from_rlhf_request(body, task_id="train")
    context: Any = {"run_id": "job-1", "ds": "2026-11-24", "var_of": lambda name: f"the-{name}"}
    operator.render_template_fields(context, operator.get_template_env(dag))
    request = operator.build_request(PREFERENCE_KEY)
    assert isinstance(request, PreferenceOptimizeRequest)
    assert (request.job_uuid, request.finetuned_model) == ("job-1", "models:/the-name/1")
    config = request.training_config
    assert config.data_config is not None
    assert config.data_config.dataset_id == "pairs/2026-11-24.jsonl"
    assert config.data_config.validation_dataset_id == "pairs/2026-11-24-held-out.jsonl"
    assert config.optimizer_config is not None
    assert (config.optimizer_config.lr, config.n_epochs) == (2e-4, 2)
    assert request.algorithm_config.beta == 0.2
    assert request.logger.tags == {"day": "2026-11-24"}


def test_templates_in_the_short_form_are_rendered_in_a_dag() -> None:
    with DAG("nightly", render_template_as_native_obj=True) as dag:
        operator = PreferenceOptimizeOperator(
            task_id="dpo",
            finetuned_model="{{ ti.xcom_pull('sft')['checkpoints'][-1]['path'] }}",
            training_config=dpo_body()["training_config"],
            algorithm_config={"beta": "{{ 0.5 }}"},
        )

    class Ti:
        def xcom_pull(self, task_id: str) -> Any:
            return {"checkpoints": [{"path": f"models:/{task_id}"}]}

    context: Any = {"ti": Ti()}
    operator.render_template_fields(context, operator.get_template_env(dag))
    request = operator.build_request(TaskKey("nightly", "run-1", "dpo"))
    assert isinstance(request, PreferenceOptimizeRequest)
    assert (request.finetuned_model, request.algorithm_config.beta) == ("models:/sft", 0.5)
