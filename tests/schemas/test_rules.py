"""Rules between fields: each is broken alone, and what is beside it is not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from post_training.schemas.requests import REQUESTS, AnyTrainingRequest, error_details
from post_training.schemas.rules import RULES, unsupported, unsupported_here
from tests.requests_of import LORA, QAT, dpo_body, sft_body


def read(body: dict[str, Any]) -> AnyTrainingRequest:
    method = "preference_optimize" if "finetuned_model" in body else "supervised_fine_tune"
    return REQUESTS[method].model_validate(body)


def broken(body: dict[str, Any]) -> dict[str, str]:
    """Return what is said of each field."""
    with pytest.raises(ValidationError) as caught:
        read(body)
    return {".".join(map(str, e["loc"])): e["msg"] for e in error_details(caught.value.errors())}


def test_every_method_has_its_rules() -> None:
    assert set(RULES) == set(REQUESTS)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (
            sft_body(training_config__max_validation_steps=0, logger_config={"sample_prompts": ["Hello?"]}),
            "logger_config.sample_prompts",
            "training_config.max_validation_steps is 0",
        ),
        (
            dpo_body(training_config__max_validation_steps=0, logger_config={"sample_prompts": ["Hello?"]}),
            "logger_config.sample_prompts",
            "training_config.max_validation_steps is 0",
        ),
        (
            sft_body(algorithm_config=None, runtime={"export": "merged"}),
            "runtime.export",
            "this job trains none, got 'merged'",
        ),
        (dpo_body(runtime={"export": "adapter"}), "runtime.export", "trains none, got 'adapter'"),
        (
            sft_body(algorithm_config=QAT, runtime={"export": "merged"}),
            "runtime.export",
            "a QAT job exports the quantized model, got 'merged'",
        ),
        (
            sft_body(algorithm_config=QAT, runtime={"export": "adapter", "adapter": LORA}),
            "runtime.export",
            "a QAT job exports the quantized model, got 'adapter'",
        ),
        (sft_body(runtime={"adapter": LORA}), "runtime.adapter", "algorithm_config, which is LoRA"),
        (
            sft_body(algorithm_config=None, runtime={"adapter": LORA}),
            "runtime.adapter",
            "algorithm_config, which is null",
        ),
        (
            sft_body(algorithm_config=QAT, runtime={"adapter": LORA | {"use_dora": True}}),
            "runtime.adapter.use_dora",
            "must be false: a QAT job quantizes base and update together, got True",
        ),
        (
            sft_body(algorithm_config=QAT, runtime={"adapter": LORA | {"quantize_base": True}}),
            "runtime.adapter.quantize_base",
            "must be false: a QAT job quantizes base and update together, got True",
        ),
        (
            sft_body(runtime={"reference_logprobs": "precomputed"}),
            "runtime.reference_logprobs",
            "is for preference jobs: a fine-tuning job has no reference, got 'precomputed'",
        ),
        (
            sft_body(logger_config={"log_model": False}),
            "logger_config.log_model",
            "needs a checkpoint_dir: else nothing of the training would be kept, got False",
        ),
        (
            dpo_body(logger_config={"log_model": False}),
            "logger_config.log_model",
            'must be "all" or true: a preference job has no checkpoint_dir',
        ),
        (
            dpo_body(training_config__data_config__train_on_input=True),
            "training_config.data_config.train_on_input",
            "must be false: the prompt is the same for both answers",
        ),
        (
            dpo_body(runtime={"reference_logprobs": "live"}),
            "runtime.reference_logprobs",
            "needs runtime.adapter: the live reference is the model without it, got 'live'",
        ),
        (dpo_body(training_config__data_config=...), "training_config.data_config", "Field required"),
    ],
)
def test_a_broken_rule_names_field_rule_and_value(body: dict[str, Any], field: str, message: str) -> None:
    told = broken(body)
    assert list(told) == [field]
    assert message in told[field]


@pytest.mark.parametrize(
    "body",
    [
        sft_body(training_config__max_validation_steps=0, logger_config={"sample_prompts": []}),
        sft_body(training_config__max_validation_steps=None, logger_config={"sample_prompts": ["Hello?"]}),
        sft_body(runtime={"export": "merged"}),
        sft_body(algorithm_config=QAT, runtime={"adapter": LORA | {"use_dora": False}}),
        sft_body(checkpoint_dir="checkpoints", logger_config={"log_model": False}),
        *(sft_body(algorithm_config=QAT, logger_config={"log_model": which}) for which in (True, "all")),
        sft_body(training_config__data_config__train_on_input=True),
        *(dpo_body(logger_config={"log_model": which}) for which in (True, "all")),
        dpo_body(runtime={"reference_logprobs": "precomputed"}),
        dpo_body(runtime={"reference_logprobs": "live", "adapter": LORA | {"quantize_base": True}}),
        dpo_body(runtime={"export": "merged", "adapter": LORA | {"use_dora": True}}),
    ],
)
def test_what_no_rule_forbids_is_accepted(body: dict[str, Any]) -> None:
    assert read(body).job_uuid == "job-1"


def test_all_that_is_broken_is_told_at_once() -> None:
    told = broken(
        dpo_body(
            training_config__data_config__train_on_input=True,
            training_config__max_validation_steps=0,
            logger_config={"log_model": False, "sample_prompts": ["Hello?"]},
            runtime={"reference_logprobs": "live", "export": "merged"},
        )
    )
    assert set(told) == {
        "training_config.data_config.train_on_input",
        "logger_config.log_model",
        "logger_config.sample_prompts",
        "runtime.reference_logprobs",
        "runtime.export",
    }
    adapter = LORA | {"use_dora": True, "quantize_base": True}
    assert set(broken(sft_body(algorithm_config=QAT, runtime={"adapter": adapter}))) == {
        "runtime.adapter.use_dora",
        "runtime.adapter.quantize_base",
    }


@pytest.mark.parametrize("flag", ["fsdp_cpu_offload", "memory_efficient_fsdp_wrap"])
@pytest.mark.parametrize("body_of", [sft_body, dpo_body])
def test_what_needs_several_devices_is_named(body_of: Any, flag: str) -> None:
    (problem,) = unsupported(read(body_of(training_config__efficiency_config={flag: True})))
    assert problem["loc"] == ["training_config", "efficiency_config", flag]
    assert "FSDP" in problem["msg"]
    body = body_of(
        training_config__efficiency_config={flag: True}, runtime={"devices": 2, "strategy": "fsdp"}
    )
    assert unsupported(read(body)) == []


def test_only_ray_starts_processes_on_several_nodes() -> None:
    (problem,) = unsupported(read(sft_body(runtime={"num_nodes": 3})))
    assert (problem["loc"], problem["msg"][-5:]) == (["runtime", "num_nodes"], "got 3")
    assert unsupported(read(sft_body(runtime={"num_nodes": 3, "launcher": "ray"}))) == []


def test_only_a_jobs_own_task_submits_to_ray() -> None:
    (problem,) = unsupported_here(read(sft_body(runtime={"launcher": "ray"})))
    assert (problem["loc"], problem["msg"][-9:]) == (["runtime", "launcher"], "got 'ray'")
    assert unsupported_here(read(sft_body(runtime={"devices": 2}))) == []


FSDP = {"devices": 2, "strategy": "fsdp"}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"runtime": {"strategy": "ddp"}}, "must be auto on one device"),
        ({"runtime": FSDP, "algorithm_config__quantize_base": True}, "with quantize_base"),
        ({"runtime": FSDP, "training_config__dtype": "fp16"}, "with dtype fp16"),
        (
            {"runtime": FSDP, "training_config__efficiency_config": {"enable_activation_offloading": True}},
            "with enable_activation_offloading",
        ),
    ],
)
def test_a_strategy_that_means_nothing_is_refused(changes: dict[str, Any], rule: str) -> None:
    (message,) = broken(sft_body(**changes)).values()
    assert rule in message
    others = {name: value for name, value in changes.items() if name != "runtime"}
    read(sft_body(**others, runtime={"devices": 2, "strategy": "ddp"}))


@pytest.mark.parametrize(
    "body",
    [
        sft_body(),
        sft_body(algorithm_config=QAT),
        sft_body(algorithm_config__quantize_base=True),
        sft_body(training_config__efficiency_config={"enable_activation_checkpointing": True}),
        dpo_body(),
        dpo_body(runtime={"adapter": LORA}),
    ],
)
def test_everything_else_is_supported(body: dict[str, Any]) -> None:
    assert unsupported(read(body)) == []
