"""The configuration of a scheduled retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from post_training.schemas.requests import REQUESTS
from post_training.schemas.retraining import STAGES, RetrainingConfig, RetrainingFile

FILE = Path(__file__).resolve().parents[2] / "dags" / "scheduled_retraining.yaml"
LORA = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj"],
    "apply_lora_to_mlp": False,
    "apply_lora_to_output": False,
    "rank": 4,
    "alpha": 8,
}
TRAINING = {"n_epochs": 1, "data_config": {"batch_size": 2, "shuffle": True}}


def config(**sections: Any) -> dict[str, Any]:
    """A valid configuration with sections replaced; None leaves one out."""
    body: dict[str, Any] = {
        "model": {"name": "assistant", "base": "org/model"},
        "data": {"dataset_id": "rows.jsonl", "preference_dataset_id": "pairs.jsonl"},
        "supervised_fine_tune": {"training_config": TRAINING, "algorithm_config": LORA},
        "preference_optimize": {"training_config": TRAINING, "algorithm_config": {"beta": 0.2}},
        "quantize": {
            "training_config": TRAINING,
            "algorithm_config": {"type": "QAT", "quantizer_name": "8da4w-qat", "group_size": 32},
        },
        **sections,
    }
    return {name: value for name, value in body.items() if value is not None}


def broken(**sections: Any) -> list[tuple[str, str]]:
    """The places of what is refused, and the rules."""
    with pytest.raises(ValidationError) as caught:
        RetrainingConfig.model_validate(config(**sections))
    return [(".".join(map(str, error["loc"])), error["msg"]) for error in caught.value.errors()]


def test_each_stage_becomes_a_valid_request() -> None:
    retraining = RetrainingConfig.model_validate(config())
    assert retraining.stages == list(STAGES)
    for stage in retraining.stages:
        body = retraining.stage_request(
            stage, "models:/m-1", "runs:/1/train.jsonl", "runs:/1/validation.jsonl"
        )
        request = REQUESTS[STAGES[stage]].model_validate({**body, "job_uuid": "x"}, strict=False)
        data = request.training_config.data_config
        assert data is not None
        assert (data.dataset_id, data.validation_dataset_id) == (
            "runs:/1/train.jsonl",
            "runs:/1/validation.jsonl",
        )
        assert data.batch_size == 2
        named = body["finetuned_model" if stage == "preference_optimize" else "model"]
        assert named == "models:/m-1"


def test_rows_and_pairs_are_read_in_the_format_of_the_data() -> None:
    data = {"dataset_id": "rows.jsonl", "data_format": "dialog", "preference_dataset_id": "pairs.jsonl"}
    retraining = RetrainingConfig.model_validate(config(data=data))
    formats = [
        retraining.stage_request(stage, None, "a.jsonl", None)["training_config"]["data_config"][
            "data_format"
        ]
        for stage in retraining.stages
    ]
    assert formats == ["dialog", "dialog", "dialog"]


def test_the_file_beside_the_dag_is_valid() -> None:
    file = RetrainingFile.model_validate(yaml.safe_load(FILE.read_text()))
    assert file.schedule.cron == "0 2 * * *"
    assert file.stages == ["supervised_fine_tune"]


@pytest.mark.parametrize(
    ("sections", "place", "rule"),
    [
        (
            {"supervised_fine_tune": None, "preference_optimize": None, "quantize": None},
            "supervised_fine_tune",
            "one stage of supervised_fine_tune, preference_optimize, quantize must be given",
        ),
        ({"data": {"dataset_id": "rows.jsonl"}}, "data.preference_dataset_id", "is required"),
        (
            {"data": {"dataset_id": "r", "preference_dataset_id": "p", "evaluation_fraction": 0.0}},
            "data.evaluation_fraction",
            "must be above 0, or evaluation.dataset_id be given",
        ),
        ({"evaluation": {"dataset_id": "own.jsonl"}}, "data.evaluation_fraction", "must be 0"),
        (
            {"evaluation": {"data_format": "dialog"}},
            "evaluation.data_format",
            "is that of evaluation.dataset_id",
        ),
        (
            {
                "supervised_fine_tune": {
                    "training_config": TRAINING | {"n_epochs": 0},
                    "algorithm_config": LORA,
                }
            },
            "supervised_fine_tune.training_config.n_epochs",
            "greater than or equal to 1",
        ),
        (
            {"supervised_fine_tune": {"training_config": TRAINING, "model": "org/other"}},
            "supervised_fine_tune.model",
            "must be left out",
        ),
        (
            {
                "supervised_fine_tune": {
                    "training_config": TRAINING,
                    "algorithm_config": LORA,
                    "hyperparam_search_config": {
                        "space": {"algorithm_config.ranks": {"type": "int", "low": 2, "high": 8}},
                        "n_trials": 2,
                    },
                }
            },
            "supervised_fine_tune.hyperparam_search_config.space.algorithm_config.ranks",
            "did you mean 'algorithm_config.rank'?",
        ),
        (
            {
                "quantize": {
                    "training_config": {"n_epochs": 1, "data_config": {"dataset_id": "x", "batch_size": 1}},
                }
            },
            "quantize.training_config.data_config.dataset_id",
            "must be left out",
        ),
        (
            {"quantize": {"training_config": TRAINING, "algorithm_config": LORA}},
            "quantize.algorithm_config.type",
            "must be 'QAT'",
        ),
        (
            {
                "supervised_fine_tune": {
                    "training_config": TRAINING,
                    "logger_config": {"log_model": False},
                    "checkpoint_dir": "copies",
                }
            },
            "supervised_fine_tune.logger_config.log_model",
            "must not be false",
        ),
        (
            {"data": {"dataset_id": "r", "preference_dataset_id": "p", "validation_fraction": 0.0}},
            "checkpoint",
            "must be 'last'",
        ),
        (
            {"gate": {"gates": [{"metric": "exact_match", "at_least": 0.5}]}},
            "gate.gates.0.metric",
            "is not measured without evaluation.exact_match, got 'exact_match'",
        ),
        ({"gate": {"gates": [{"metric": "bleu", "at_least": 0.5}]}}, "gate.gates.0.metric", "'loss'"),
        *(({"model": {"name": name}}, "model.name", "pattern") for name in ("it's", "123", "1e3", " ", "a ")),
        *(({"model": {"name": name}}, "model.name", "no word of Python's own") for name in ("None", "True")),
        (
            {"gate": {"gates": [{"metric": "reward_accuracy", "against": "base", "min_improvement": 0.1}]}},
            "gate.gates.0.against",
            "set at_least instead",
        ),
        (
            {
                "quantize": None,
                "supervised_fine_tune": {"training_config": TRAINING | {"max_validation_steps": 0}},
            },
            "supervised_fine_tune.training_config.max_validation_steps",
            "must not be 0",
        ),
        (
            {"data": {"dataset_id": "r", "preference_dataset_id": "p", "rows": "new"}},
            "supervised_fine_tune.training_config.max_steps_per_epoch",
            "must be 0 with data.rows 'new'",
        ),
        ({"hyperparam": {}}, "hyperparam", "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    sections: dict[str, Any], place: str, rule: str
) -> None:
    assert any(where == place and rule in said for where, said in broken(**sections)), broken(**sections)


def test_a_reward_gate_needs_held_out_pairs() -> None:
    gate = {"gates": [{"metric": "reward_accuracy", "at_least": 0.5}]}
    assert RetrainingConfig.model_validate(config(gate=gate))
    data = {"dataset_id": "rows.jsonl", "evaluation_fraction": 0.1}
    problems = broken(gate=gate, data=data, preference_optimize=None)
    assert ("gate.gates.0.metric" in dict(problems)) is True


def test_a_time_zone_is_one() -> None:
    with pytest.raises(ValidationError, match="must be a time zone like Europe/Berlin, got 'Mars/Olympus'"):
        RetrainingFile.model_validate(config(schedule={"timezone": "Mars/Olympus"}))


def test_the_digest_is_that_of_configuration_and_data() -> None:
    one, same = (RetrainingConfig.model_validate(config()) for _ in range(2))
    other = RetrainingConfig.model_validate(config(checkpoint="last"))
    assert one.digest("data") == same.digest("data")
    assert len({one.digest("data"), one.digest("more"), other.digest("data")}) == 3
    asked = RetrainingConfig.model_validate(config(approval={"required": True}))
    assert asked.digest("data") == one.digest("data")  # who is asked changes nothing that is trained
