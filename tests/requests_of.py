"""Request bodies for tests: valid ones, and valid ones with one part changed."""

from __future__ import annotations

import copy
from typing import Any

LORA: dict[str, Any] = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "apply_lora_to_mlp": False,
    "apply_lora_to_output": False,
    "rank": 4,
    "alpha": 8,
}


QAT: dict[str, Any] = {"type": "QAT", "quantizer_name": "int4_weight_only", "group_size": 32}

PLAIN_END: dict[str, Any] = {"log_figures": False, "sample_prompts": []}
"""A ``logger_config`` for jobs of tests that look at neither: they take longer than to train a tiny model."""

OPTIMIZER: dict[str, Any] = {
    "optimizer_type": "adamw",
    "lr": 1e-4,
    "weight_decay": 0.0,
    "num_warmup_steps": 0,
}


def sft_body(**changes: Any) -> dict[str, Any]:
    """Return a valid body of supervised-fine-tune; keys are dotted paths with ``__`` for the dot.

    A value of ``...`` deletes the field.
    """
    body: dict[str, Any] = {
        "job_uuid": "job-1",
        "model": "org/model",
        "training_config": {
            "n_epochs": 1,
            "data_config": {
                "dataset_id": "train.jsonl",
                "batch_size": 2,
                "shuffle": False,
                "data_format": "instruct",
            },
        },
        "algorithm_config": copy.deepcopy(LORA),
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    return changed(body, **changes)


def dpo_body(**changes: Any) -> dict[str, Any]:
    """Return a valid body of preference-optimize, changed in the same way."""
    body = sft_body()
    body["finetuned_model"] = body.pop("model")
    body["algorithm_config"] = {"beta": 0.1, "loss_type": "sigmoid"}
    return changed(body, **changes)


def rlhf_body(**changes: Any) -> dict[str, Any]:
    """Return a valid body of preference-optimize in its long form, changed in the same way."""
    body: dict[str, Any] = {
        "job_uuid": "job-1",
        "finetuned_model": {"uri": "org/model"},
        "dataset_id": "train.jsonl",
        "validation_dataset_id": "test.jsonl",
        "algorithm": "dpo",
        "algorithm_config": {"beta": 0.1, "loss_type": "sigmoid"},
        "optimizer_config": copy.deepcopy(OPTIMIZER),
        "training_config": {"n_epochs": 1},
        "hyperparam_search_config": {},
        "logger_config": {},
    }
    return changed(body, **changes)


def changed(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the body with the named fields set or, by ``...``, deleted."""
    body = copy.deepcopy(body)
    for path, value in changes.items():
        *groups, name = path.split("__")
        target = body
        for group in groups:
            target = target.setdefault(group, {})
        if value is ...:
            del target[name]
        else:
            target[name] = value
    return body
