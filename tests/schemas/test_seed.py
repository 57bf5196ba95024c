"""The schema has every class and field of the published one, with its defaults."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from post_training.schemas import algorithms, jobs, requests, rlhf, training

REQUIRED = ...

# Field -> default in the published schema; ``...`` is required.
PUBLISHED: dict[type[BaseModel], dict[str, Any]] = {
    training.DataConfig: {
        "dataset_id": REQUIRED,
        "batch_size": REQUIRED,
        "shuffle": REQUIRED,
        "data_format": REQUIRED,
        "validation_dataset_id": None,
        "packed": False,
        "train_on_input": False,
    },
    training.OptimizerConfig: dict.fromkeys(
        ("optimizer_type", "lr", "weight_decay", "num_warmup_steps"), REQUIRED
    ),
    training.EfficiencyConfig: dict.fromkeys(
        (
            "enable_activation_checkpointing",
            "enable_activation_offloading",
            "memory_efficient_fsdp_wrap",
            "fsdp_cpu_offload",
        ),
        False,
    ),
    training.TrainingConfig: {
        "n_epochs": REQUIRED,
        "max_steps_per_epoch": 1,
        "gradient_accumulation_steps": 1,
        "max_validation_steps": 1,
        "data_config": None,
        "optimizer_config": None,
        "efficiency_config": None,
        "dtype": "bf16",
    },
    algorithms.LoraFinetuningConfig: {
        "type": "LoRA",
        "lora_attn_modules": REQUIRED,
        "apply_lora_to_mlp": REQUIRED,
        "apply_lora_to_output": REQUIRED,
        "rank": REQUIRED,
        "alpha": REQUIRED,
        "use_dora": False,
        "quantize_base": False,
    },
    algorithms.QATFinetuningConfig: {"type": "QAT", "quantizer_name": REQUIRED, "group_size": REQUIRED},
    # The contract makes all six optional and neutral.
    algorithms.DPOAlignmentConfig: {
        "reward_scale": 1.0,
        "reward_clip": None,
        "epsilon": 1e-8,
        "gamma": 1.0,
        "beta": 0.1,
        "loss_type": algorithms.DPOLossType.sigmoid,
    },
    jobs.PostTrainingJobLogStream: {"job_uuid": REQUIRED, "log_lines": REQUIRED},
    rlhf.PostTrainingRLHFRequest: dict.fromkeys(
        (
            "job_uuid",
            "finetuned_model",
            "dataset_id",
            "validation_dataset_id",
            "algorithm",
            "algorithm_config",
            "optimizer_config",
            "training_config",
            "hyperparam_search_config",
            "logger_config",
        ),
        REQUIRED,
    ),
    jobs.PostTrainingJob: {"job_uuid": REQUIRED},
    jobs.PostTrainingJobStatusResponse: {
        "job_uuid": REQUIRED,
        "status": REQUIRED,
        "scheduled_at": None,
        "started_at": None,
        "completed_at": None,
        "resources_allocated": None,
        "checkpoints": [],
    },
    jobs.ListPostTrainingJobsResponse: {"data": REQUIRED},
    jobs.PostTrainingJobArtifactsResponse: {"job_uuid": REQUIRED, "checkpoints": []},
    requests.SupervisedFineTuneRequest: {
        "job_uuid": REQUIRED,
        "training_config": REQUIRED,
        "hyperparam_search_config": REQUIRED,
        "logger_config": REQUIRED,
        "model": None,
        "checkpoint_dir": None,
        "algorithm_config": None,
    },
    requests.PreferenceOptimizeRequest: dict.fromkeys(
        (
            "job_uuid",
            "finetuned_model",
            "algorithm_config",
            "training_config",
            "hyperparam_search_config",
            "logger_config",
        ),
        REQUIRED,
    ),
}

ENUMS: dict[type[Enum], set[str]] = {
    training.OptimizerType: {"adam", "adamw", "sgd"},
    training.DatasetFormat: {"instruct", "dialog"},
    algorithms.RLHFAlgorithm: {"dpo"},
    algorithms.DPOLossType: {"sigmoid", "hinge", "ipo", "kto_pair"},
    jobs.JobStatus: {"completed", "in_progress", "failed", "scheduled", "cancelled"},
}


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.__name__)
def test_fields_and_defaults(model: type[BaseModel]) -> None:
    for name, expected in PUBLISHED[model].items():
        default = model.model_fields[name].get_default(call_default_factory=True, validated_data={})
        assert (REQUIRED if default is PydanticUndefined else default) == expected, name


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_enum_values(enum: type[Enum]) -> None:
    assert {member.value for member in enum} == ENUMS[enum]


@pytest.mark.parametrize("model", PUBLISHED, ids=lambda model: model.__name__)
def test_every_class_says_what_it_is(model: type[BaseModel]) -> None:
    assert model.__doc__
