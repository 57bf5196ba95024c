"""The strict bodies: what is accepted, and which field, rule and value a refusal names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from post_training.schemas.requests import (
    PostTrainingRLHFRequest,
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
    error_details,
    unsupported,
)
from tests.requests_of import dpo_body, sft_body


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
        ({"hyperparam_search_config": {"n_trials": 3}}, "hyperparam_search_config", "got n_trials"),
        ({"logger_config": {"wandb": True}}, "logger_config.wandb", "Extra inputs"),
        (
            {"logger_config": {"tags": {"mlflow.user": "me"}}},
            "logger_config.tags",
            "must not start with post_training., airflow., mlflow., got 'mlflow.user'",
        ),
        ({"hyperparam_search_config": ...}, "hyperparam_search_config", "Field required"),
        ({"runtime": {"devices": 2}}, "runtime.devices", "less than or equal to 1, got 2"),
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


def test_the_long_form_of_a_preference_job_is_read() -> None:
    body = {
        "job_uuid": "job-1",
        "finetuned_model": {"uri": "org/model"},
        "dataset_id": "train.jsonl",
        "validation_dataset_id": "test.jsonl",
        "algorithm": "dpo",
        "algorithm_config": {"beta": 0.2},
        "optimizer_config": {
            "optimizer_type": "adamw",
            "lr": 1e-4,
            "weight_decay": 0.0,
            "num_warmup_steps": 0,
        },
        "training_config": {"n_epochs": 1},
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    assert PostTrainingRLHFRequest.model_validate(body).algorithm_config.beta == 0.2


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (
            sft_body(algorithm_config={"type": "QAT", "quantizer_name": "x", "group_size": 32}),
            "algorithm_config.type",
        ),
        (sft_body(algorithm_config__quantize_base=True), "algorithm_config.quantize_base"),
        (
            sft_body(training_config__efficiency_config={"fsdp_cpu_offload": True}),
            "training_config.efficiency_config.fsdp_cpu_offload",
        ),
        (
            sft_body(training_config__efficiency_config={"memory_efficient_fsdp_wrap": True}),
            "training_config.efficiency_config.memory_efficient_fsdp_wrap",
        ),
    ],
)
def test_what_this_version_cannot_train_is_named(body: dict[str, Any], field: str) -> None:
    (problem,) = unsupported(SupervisedFineTuneRequest.model_validate(body))
    assert ".".join(map(str, problem["loc"])) == field


def test_preference_optimization_is_refused_and_plain_lora_is_not() -> None:
    (problem,) = unsupported(PreferenceOptimizeRequest.model_validate(dpo_body()))
    assert problem["loc"] == ["algorithm_config"]
    assert unsupported(SupervisedFineTuneRequest.model_validate(sft_body())) == []
