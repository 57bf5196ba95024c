"""The strict bodies: what is accepted, and which field, rule and value a refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from post_training.schemas.algorithms import (
    QUANTIZER_ALIASES,
    LoraFinetuningConfig,
    QATFinetuningConfig,
    Quantizer,
)
from post_training.schemas.requests import (
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
    error_details,
)
from tests.requests_of import LORA, QAT, dpo_body, sft_body


def refused(model: type, body: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    (detail,) = error_details(caught.value.errors())
    return ".".join(map(str, detail["loc"])), detail["msg"]


def test_defaults_are_the_published_schemas() -> None:
    request = SupervisedFineTuneRequest.model_validate(sft_body())
    config = request.training_config
    assert (config.max_steps_per_epoch, config.gradient_accumulation_steps) == (1, 1)
    assert (config.max_validation_steps, config.dtype) == (1, "bf16")
    assert (config.optimizer_config, config.efficiency_config) == (None, None)
    assert config.data_config is not None
    assert (config.data_config.packed, config.data_config.train_on_input) == (False, False)
    assert request.algorithm_config is not None
    assert request.algorithm_config.model_dump() == {
        "type": "LoRA",
        "lora_attn_modules": ["q_proj", "v_proj"],
        "apply_lora_to_mlp": False,
        "apply_lora_to_output": False,
        "rank": 4,
        "alpha": 8,
        "use_dora": False,
        "quantize_base": False,
    }


def test_configs_may_be_json_strings() -> None:
    body = sft_body()
    as_text = {key: json.dumps(value) if key.endswith("g_config") else value for key, value in body.items()}
    as_text |= {"logger_config": {}, "algorithm_config": json.dumps(body["algorithm_config"])}
    assert SupervisedFineTuneRequest.model_validate(as_text) == SupervisedFineTuneRequest.model_validate(body)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"colour": "red"}, "colour", "Extra inputs are not permitted"),
        ({"training_config__n_epoch": 1}, "training_config.n_epoch", "Extra inputs"),
        ({"training_config__n_epochs": "1"}, "training_config.n_epochs", "valid integer, got '1'"),
        (
            {"training_config__n_epochs": 10**40},
            "training_config.n_epochs",
            "less than or equal to 2147483647",
        ),
        ({"training_config__n_epochs": 0}, "training_config.n_epochs", "greater than or equal to 1, got 0"),
        ({"training_config__dtype": "fp8"}, "training_config.dtype", "'bf16', 'fp16' or 'fp32', got 'fp8'"),
        ({"training_config__data_config": ...}, "training_config.data_config", "Field required"),
        ({"training_config": "{"}, "training_config", "JSON string"),
        (
            {"training_config__data_config__shuffle": 1},
            "training_config.data_config.shuffle",
            "valid boolean, got 1",
        ),
        (
            {"training_config__data_config__data_format": "chat"},
            "training_config.data_config.data_format",
            "'instruct' or 'dialog', got 'chat'",
        ),
        ({"algorithm_config__rank": 0}, "algorithm_config.rank", "greater than or equal to 1, got 0"),
        ({"algorithm_config__type": "ORPO"}, "algorithm_config", "'LoRA', 'QAT'"),
        ({"algorithm_config__lora_attn_modules": []}, "algorithm_config", "nothing would be trained"),
        ({"hyperparam_search_config": {"n_trials": 3}}, "hyperparam_search_config.space", "Field required"),
        ({"logger_config": {"wandb": True}}, "logger_config.wandb", "Extra inputs"),
        (
            {"logger_config": {"tags": {"mlflow.user": "me"}}},
            "logger_config.tags",
            "must not start with post_training., airflow., mlflow., got 'mlflow.user'",
        ),
        ({"hyperparam_search_config": ...}, "hyperparam_search_config", "Field required"),
        ({"runtime": {"devices": 0}}, "runtime.devices", "greater than or equal to 1, got 0"),
        ({"runtime": {"strategy": "deepspeed"}}, "runtime.strategy", "'auto', 'ddp' or 'fsdp'"),
        ({"training_config__optimizer_config": {"lr": float("nan")}}, None, None),
    ],
)
def test_refusals_name_field_rule_and_value(
    changes: dict[str, Any], field: str | None, message: str | None
) -> None:
    if field is None:
        with pytest.raises(ValidationError, match="finite number"):
            SupervisedFineTuneRequest.model_validate(sft_body(**changes))
        return
    loc, msg = refused(SupervisedFineTuneRequest, sft_body(**changes))
    assert loc == field
    assert message is not None
    assert message in msg


def test_an_unknown_fields_value_is_not_repeated() -> None:
    _, msg = refused(SupervisedFineTuneRequest, sft_body(api_key="hunter2"))
    assert "hunter2" not in msg


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"data_config":{"dataset_id":"https://u:hunter2@h/x.jsonl"} ', "line 1 column 61"),
        ("hunter2", "line 1 column 1"),
        ('"hunter2"', "valid dictionary"),
        ('["hunter2", "\\ud800"]', "valid Unicode"),
    ],
)
@pytest.mark.parametrize("field", ["training_config", "logger_config", "hyperparam_search_config", "runtime"])
def test_text_where_an_object_belongs_is_not_repeated(text: str, rule: str, field: str) -> None:
    loc, msg = refused(SupervisedFineTuneRequest, sft_body(**{field: text}))
    assert loc == field
    assert rule in msg
    assert "hunter2" not in msg


@pytest.mark.parametrize("job_uuid", ["a", "A-1_2.3~4:5+6", "x" * 200, "manual__2026-11-24T00:00:00+00:00"])
def test_job_uuid_is_accepted(job_uuid: str) -> None:
    assert SupervisedFineTuneRequest.model_validate(sft_body(job_uuid=job_uuid)).job_uuid == job_uuid


@pytest.mark.parametrize(
    ("job_uuid", "rule"),
    [
        ("", "1 to 200 characters"),
        ("x" * 201, "1 to 200 characters"),
        ("a/b", "may hold only"),
        ("a\n", "may hold only"),
        ("a b", "may hold only"),
        ("ä", "may hold only"),
        ("..", "'..'"),
        ("a..b", "'..'"),
        (".", "'.'"),
        ("scheduled__1", "must not start with"),
        ("backfill__1", "must not start with"),
    ],
)
def test_job_uuid_is_refused(job_uuid: str, rule: str) -> None:
    loc, msg = refused(SupervisedFineTuneRequest, sft_body(job_uuid=job_uuid))
    assert loc == "job_uuid"
    assert rule in msg
    assert repr(job_uuid[:80]) in msg


def test_the_payload_hash_is_of_the_meaning_not_of_the_spelling() -> None:
    plain = SupervisedFineTuneRequest.model_validate(sft_body())
    spelled_out = SupervisedFineTuneRequest.model_validate(sft_body(training_config__dtype="bf16"))
    other = SupervisedFineTuneRequest.model_validate(sft_body(training_config__dtype="fp32"))
    assert plain.payload_hash() == spelled_out.payload_hash()
    assert plain.payload_hash() != other.payload_hash()


@pytest.mark.parametrize(
    "algorithm_config",
    [
        {},
        {"beta": 0.1, "loss_type": "ipo"},
        {"reward_scale": 1.0, "reward_clip": 5.0, "epsilon": 0.1, "gamma": 0.99},
    ],
)
def test_dpo_takes_what_older_and_newer_clients_send(algorithm_config: dict[str, Any]) -> None:
    request = PreferenceOptimizeRequest.model_validate(dpo_body(algorithm_config=algorithm_config))
    config = request.algorithm_config
    neutral = {"reward_scale": 1.0, "reward_clip": None, "epsilon": 1e-8, "gamma": 1.0, "beta": 0.1}
    expected = {**neutral, "loss_type": "sigmoid", **algorithm_config}
    assert config.model_dump(mode="json") == expected


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"algorithm_config__epsilon": -1e-9}, "algorithm_config.epsilon", "greater than or equal to 0"),
        ({"algorithm_config__gamma": 0.0}, "algorithm_config.gamma", "greater than 0, got 0.0"),
        ({"algorithm_config__gamma": 1.5}, "algorithm_config.gamma", "less than or equal to 1, got 1.5"),
        ({"algorithm_config__reward_clip": 0.0}, "algorithm_config.reward_clip", "greater than 0, got 0.0"),
        ({"algorithm_config__reward_scale": 0.0}, "algorithm_config.reward_scale", "greater than 0, got 0.0"),
        ({"algorithm_config__beta": -0.1}, "algorithm_config.beta", "greater than 0, got -0.1"),
        ({"algorithm_config__loss_type": "orpo"}, "algorithm_config.loss_type", "'sigmoid', 'hinge', 'ipo'"),
        ({"runtime": {"adapter": LORA | {"rank": 0}}}, "runtime.adapter.rank", "equal to 1, got 0"),
        ({"runtime": {"adapter": QAT}}, "runtime.adapter", None),
        ({"runtime": {"export": "onnx"}}, "runtime.export", "'adapter' or 'merged', got 'onnx'"),
        ({"logger_config": {"log_model": "some"}}, "logger_config.log_model", "'all', got 'some'"),
        ({"logger_config": {"sample_prompts": [""]}}, "logger_config.sample_prompts.0", "at least 1 char"),
        ({"logger_config": {"sample_prompts": ["x"] * 21}}, "logger_config.sample_prompts", "at most 20"),
    ],
)
def test_refusals_of_preference_requests(changes: dict[str, Any], field: str, message: str | None) -> None:
    if message is None:
        with pytest.raises(ValidationError, match=rf"{field}\.type"):
            PreferenceOptimizeRequest.model_validate(dpo_body(**changes))
        return
    loc, msg = refused(PreferenceOptimizeRequest, dpo_body(**changes))
    assert loc == field
    assert message in msg


@pytest.mark.parametrize("alias", [*QUANTIZER_ALIASES, *[quantizer.value for quantizer in Quantizer]])
def test_a_quantizers_names_are_one_scheme(alias: str) -> None:
    named = SupervisedFineTuneRequest.model_validate(
        sft_body(algorithm_config=QAT | {"quantizer_name": alias})
    )
    assert isinstance(named.algorithm_config, QATFinetuningConfig)
    canonical = named.algorithm_config.quantizer_name
    assert canonical is QUANTIZER_ALIASES.get(alias, canonical)
    plain = SupervisedFineTuneRequest.model_validate(
        sft_body(algorithm_config=QAT | {"quantizer_name": canonical.value})
    )
    assert named.payload_hash() == plain.payload_hash()


def test_every_name_of_a_quantizer_is_described() -> None:
    described = QATFinetuningConfig.model_json_schema()["properties"]["quantizer_name"]["enum"]
    assert sorted(described) == sorted([*QUANTIZER_ALIASES, *[quantizer.value for quantizer in Quantizer]])


def test_an_unknown_quantizer_is_refused() -> None:
    loc, msg = refused(SupervisedFineTuneRequest, sft_body(algorithm_config=QAT | {"quantizer_name": "int2"}))
    assert loc == "algorithm_config.quantizer_name"
    assert "got 'int2'" in msg


@pytest.mark.parametrize(
    "runtime",
    [{}, {"export": None}, {"save_total_limit": None, "reference_logprobs": None}, "{}"],
)
def test_a_runtime_block_that_says_nothing_is_none(runtime: Any) -> None:
    plain = PreferenceOptimizeRequest.model_validate(dpo_body())
    empty = PreferenceOptimizeRequest.model_validate(dpo_body(runtime=runtime))
    assert empty.runtime is None
    assert empty.payload_hash() == plain.payload_hash()


def test_a_null_adapter_is_said_and_other_nulls_are_not() -> None:
    runtime = {"adapter": None, "export": None, "seed": 3}
    request = PreferenceOptimizeRequest.model_validate(dpo_body(runtime=runtime))
    assert request.runtime is not None
    assert request.runtime.model_fields_set == {"adapter", "seed"}
    assert (request.runtime.seed, request.adapters) == (3, None)


def test_the_adapters_of_a_job_are_found_where_its_method_has_them() -> None:
    lora = LoraFinetuningConfig.model_validate(LORA)
    for body in (sft_body(), sft_body(algorithm_config=QAT, runtime={"adapter": LORA})):
        assert SupervisedFineTuneRequest.model_validate(body).adapters == lora
    for body in (sft_body(algorithm_config=None), sft_body(algorithm_config=QAT)):
        assert SupervisedFineTuneRequest.model_validate(body).adapters is None
    preference = dpo_body(runtime={"adapter": LORA})
    assert PreferenceOptimizeRequest.model_validate(preference).adapters == lora
    assert PreferenceOptimizeRequest.model_validate(dpo_body()).adapters is None


def test_a_long_value_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as caught:
        SupervisedFineTuneRequest.model_validate(sft_body(algorithm_config={"type": ["x" * 9] * 5000}))
    (detail,) = error_details(caught.value.errors())
    assert detail["loc"] == ["algorithm_config"]
    assert len(detail["msg"]) <= 500
