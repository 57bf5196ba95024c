"""What a search may hold, and which requests its trials may vary how."""

from __future__ import annotations

import json
from typing import Any, get_args

import jsonschema
import pytest
from pydantic import ValidationError

from post_training.schemas.requests import REQUESTS, AnyTrainingRequest, error_details
from post_training.schemas.rlhf import read_request
from post_training.schemas.search import METRICS, Metric, SearchConfig, search_schema
from post_training.schemas.search_rules import with_values
from tests.requests_of import LORA, OPTIMIZER, QAT, changed, dpo_body, rlhf_body, sft_body

LR = "training_config.optimizer_config.lr"
RANK = "algorithm_config.rank"
BATCH = "training_config.data_config.batch_size"
EPOCHS = "training_config.n_epochs"
WHERE = "hyperparam_search_config"
RATES: dict[str, Any] = {"type": "float", "low": 1e-5, "high": 1e-3, "log": True}
RANKS: dict[str, Any] = {"type": "categorical", "choices": [4, 8]}


def search(*, space: Any = None, **fields: Any) -> dict[str, Any]:
    """A search, as the change of a body."""
    return {WHERE: {"space": {RANK: RANKS} if space is None else space, "n_trials": 2, **fields}}


def read(body: dict[str, Any]) -> AnyTrainingRequest:
    method = "preference_optimize" if "finetuned_model" in body else "supervised_fine_tune"
    return read_request(method, body)


def broken(body: dict[str, Any]) -> dict[str, str]:
    """Return what is said of each field."""
    with pytest.raises(ValidationError) as caught:
        read(body)
    return {".".join(map(str, e["loc"])): e["msg"] for e in error_details(caught.value.errors())}


def test_a_search_is_kept_without_its_defaults() -> None:
    said = {"space": {RANK: RANKS}, "n_trials": 2}
    spelled = {**said, "metric": "validation_loss", "direction": "minimize", "sampler": "tpe", "seed": 42}
    requests = [read(sft_body(**{WHERE: config})) for config in (said, spelled, json.dumps(said))]
    assert [request.hyperparam_search_config for request in requests] == [said] * 3
    assert len({request.payload_hash() for request in requests}) == 1
    other = read(sft_body(**search(direction="maximize")))
    assert other.hyperparam_search_config["direction"] == "maximize"
    assert other.search is not None
    assert other.search.to == "maximize"


def test_without_a_search_there_is_none() -> None:
    assert read(sft_body()).search is None
    assert read(sft_body(**{WHERE: "{}"})).hyperparam_search_config == {}


def test_templates_numbers_may_be_text() -> None:
    body = sft_body(**search(n_trials="3", space={RANK: {"type": "int", "low": "4", "high": "8"}}))
    request = read_request("supervised_fine_tune", body, strict=False)
    assert request.hyperparam_search_config["space"] == {RANK: {"type": "int", "low": 4, "high": 8}}
    with pytest.raises(ValidationError):
        read(body)


def test_a_grids_numbers_are_those_that_are_written() -> None:
    space = {"type": "float", "low": 0.1, "high": 0.7, "step": 0.1}
    config = SearchConfig.model_validate({"space": {LR: space}, "n_trials": 7, "sampler": "grid"})
    assert config.space[LR].finite == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_every_metric_has_a_direction() -> None:
    assert set(get_args(Metric)) == set(METRICS)


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        ({"space": {}}, "space", "at least 1 item"),
        ({"metric": "accuracy"}, "metric", "got 'accuracy'"),
        ({"sampler": "cmaes"}, "sampler", "got 'cmaes'"),
        ({"pruner": "wilcoxon"}, "pruner", "got 'wilcoxon'"),
        ({"n_trials": 0}, "n_trials", "greater than or equal to 1, got 0"),
        ({"n_trials": 501}, "n_trials", "less than or equal to 500, got 501"),
        ({"max_parallel": 17}, "max_parallel", "less than or equal to 16, got 17"),
        ({"timeout_seconds": 0}, "timeout_seconds", "greater than 0, got 0"),
        ({"use": "both"}, "use", "got 'both'"),
        ({"trials": 3}, "trials", "Extra inputs"),
        ({"space": {RANK: {"type": "normal"}}}, f"space.{RANK}", "does not match any of the expected tags"),
        ({"space": {RANK: {"type": "int", "low": 4}}}, f"space.{RANK}.high", "Field required"),
        (
            {"space": {RANK: {"type": "int", "low": 8, "high": 4}}},
            f"space.{RANK}.high",
            "above low, which is 8",
        ),
        (
            {"space": {RANK: {"type": "int", "low": 1, "high": 8, "step": 2}}},
            f"space.{RANK}.high",
            "whole steps of 2 above low, 1, got 8",
        ),
        (
            {"space": {LR: {"type": "float", "low": 0.0, "high": 1.0, "log": True}}},
            f"space.{LR}.low",
            "above 0 on a logarithmic scale, got 0",
        ),
        ({"space": {LR: RATES | {"step": 1e-5}}}, f"space.{LR}.step", "left out on a logarithmic scale"),
        (
            {"space": {LR: {"type": "float", "low": 0.0, "high": 1e300, "step": 1e-300}}},
            f"space.{LR}.step",
            "at most 1000000 values, got 1e-300",
        ),
        (
            {"space": {LR: {"type": "float", "low": 0.0, "high": 0.35, "step": 0.1}}},
            f"space.{LR}.high",
            "whole steps of 0.1 above low, 0, got 0.35",
        ),
        ({"space": {"r" * 201: RANKS}}, f"space.{'r' * 201}.[key]", "at most 200 characters"),
        (
            {"sampler": "grid", "space": {LR: {"type": "float", "low": 0.0, "high": 1.0, "step": 1e-5}}},
            f"space.{LR}",
            "must have choices, or a step and no log",
        ),
        (
            {"space": {RANK: {"type": "categorical", "choices": []}}},
            f"space.{RANK}.choices",
            "at least 1 item",
        ),
        (
            {"space": {RANK: {"type": "categorical", "choices": [4, 8, 4]}}},
            f"space.{RANK}.choices",
            "must differ from each other",
        ),
        ({"sampler": "grid", "n_trials": 3}, "n_trials", "at most 2, the cells of the grid, got 3"),
        ({"sampler": "grid", "space": {LR: RATES}}, f"space.{LR}", "must have choices, or a step and no log"),
        (
            {"sampler": "grid", "space": {LR: {"type": "float", "low": 0.1, "high": 0.5}}},
            f"space.{LR}",
            "must have choices, or a step and no log",
        ),
    ],
)
def test_a_refusal_names_field_rule_and_value(config: dict[str, Any], field: str, message: str) -> None:
    said = broken(sft_body(training_config__optimizer_config=OPTIMIZER, **search(**config)))
    assert list(said) == [f"{WHERE}.{field}"]
    assert message in said[f"{WHERE}.{field}"]


def test_a_search_needs_a_space_and_a_budget() -> None:
    assert broken(sft_body(**{WHERE: {"seed": 1}})) == {
        f"{WHERE}.space": "Field required",
        f"{WHERE}.n_trials": "Field required",
    }


@pytest.mark.parametrize(
    ("path", "space", "message"),
    [
        ("training_config.optimizer_config.learning_rate", RATES, f"did you mean {LR!r}"),
        ("training_config", RANKS, "is no field of a supervised_fine_tune request"),
        ("job_uuid", RANKS, "is no field"),
        ("finetuned_model", RANKS, "is no field"),
        ("model", {"type": "categorical", "choices": ["org/a"]}, "cannot be searched: it is what is trained"),
        ("training_config.data_config.dataset_id", RANKS, "cannot be searched: it is what is trained on"),
        ("training_config.max_validation_steps", RANKS, "compared on the same rows"),
        ("training_config.data_config.train_on_input", RANKS, "compared on the same tokens"),
        ("runtime.max_seq_length", RANKS, "compared on the same tokens"),
        ("logger_config", RANKS, "cannot be searched"),
        (WHERE, RANKS, "cannot be searched: it is the search itself"),
        (RANK, {"type": "int", "low": 0, "high": 8}, "greater than or equal to 1"),
        (RANK, {"type": "float", "low": 4, "high": 8}, "the value 4.0 makes a trial's request invalid"),
        (RANK, {"type": "categorical", "choices": [4, "many"]}, "the value 'many' makes a trial's request"),
        (
            "training_config.dtype",
            {"type": "categorical", "choices": ["bf16", "fp8"]},
            "the value 'fp8' makes",
        ),
        ("runtime.export", {"type": "categorical", "choices": ["adapter", "whole"]}, "the value 'whole'"),
        ("runtime.reference_logprobs", {"type": "categorical", "choices": ["live"]}, "has no reference"),
        ("algorithm_config.group_size", RANKS, "Extra inputs"),
        (
            "training_config.efficiency_config.fsdp_cpu_offload",
            {"type": "categorical", "choices": [False, True]},
            "the value True makes",
        ),
    ],
)
def test_what_cannot_be_searched_is_named_by_its_path(path: str, space: dict[str, Any], message: str) -> None:
    said = broken(sft_body(**search(space={path: space})))
    assert list(said) == [f"{WHERE}.space.{path}"]
    assert message in said[f"{WHERE}.space.{path}"]


def test_a_field_of_a_group_that_is_not_there_needs_the_group() -> None:
    said = broken(sft_body(**search(space={LR: RATES})))
    assert "optimizer_type: Field required" in said[f"{WHERE}.space"]
    together = {
        f"training_config.optimizer_config.{name}": {"type": "categorical", "choices": [value]}
        for name, value in OPTIMIZER.items()
        if name != "lr"
    }
    assert read(sft_body(**search(space={LR: RATES, **together}))).search is not None


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (
            sft_body(**search(metric="validation_rewards/margins")),
            f"{WHERE}.metric",
            "by preference jobs alone",
        ),
        (
            sft_body(training_config__max_validation_steps=0, **search()),
            f"{WHERE}.metric",
            "training_config.max_validation_steps is 0",
        ),
        (
            sft_body(training_config__max_validation_steps=4, **search(space={BATCH: RANKS})),
            "training_config.max_validation_steps",
            f"must be null where {BATCH} is searched: so many batches are other rows, got 4",
        ),
        (
            dpo_body(**search(space={"algorithm_config.beta": RATES})),
            f"{WHERE}.metric",
            "must be 'validation_rewards/accuracies' where algorithm_config.beta is searched",
        ),
        (sft_body(**search(pruner="median")), f"{WHERE}.pruner", "training_config.n_epochs must be above 1"),
        (
            sft_body(checkpoint_dir="copies", **search()),
            f"{WHERE}.use",
            "must be 'retrain' for a checkpoint_dir",
        ),
        (
            sft_body(checkpoint_dir="c", logger_config={"log_model": False}, **search()),
            "logger_config.log_model",
            "must not be false",
        ),
        (
            rlhf_body(training_config={"n_epochs": 1}, **search(space={"dataset_id": RANKS})),
            f"{WHERE}.space.dataset_id",
            "is no field of a preference_optimize request",
        ),
    ],
)
def test_what_a_search_needs_of_its_request(body: dict[str, Any], field: str, message: str) -> None:
    assert message in broken(body)[field]


@pytest.mark.parametrize(
    "body",
    [
        sft_body(training_config__max_validation_steps=None, **search(space={BATCH: RANKS})),
        sft_body(training_config__n_epochs=2, **search(pruner="hyperband")),
        sft_body(**search(pruner="median", space={EPOCHS: {"type": "int", "low": 1, "high": 3}})),
        sft_body(checkpoint_dir="c", logger_config={"log_model": False}, **search(use="retrain")),
        sft_body(
            **search(
                space={"algorithm_config.lora_attn_modules": {"type": "categorical", "choices": [["q_proj"]]}}
            )
        ),
        sft_body(algorithm_config=QAT, **search(space={"algorithm_config.group_size": RANKS})),
        sft_body(
            **search(
                space={"training_config.max_steps_per_epoch": {"type": "categorical", "choices": [None, 2]}}
            )
        ),
        dpo_body(**search(metric="validation_rewards/accuracies", space={"algorithm_config.beta": RATES})),
        dpo_body(runtime={"adapter": LORA}, **search(space={"runtime.adapter.rank": RANKS})),
        rlhf_body(**search(space={LR: RATES})),
        sft_body(
            **search(
                sampler="grid",
                n_trials=6,
                space={RANK: {"type": "int", "low": 2, "high": 4}, "algorithm_config.alpha": RANKS},
            )
        ),
    ],
)
def test_searches_that_mean_something_are_accepted(body: dict[str, Any]) -> None:
    assert read(body).search is not None


@pytest.mark.parametrize("choices", [["a", 2], [None, 2], [[1], [2]], ["abc", "de"]])
def test_choices_of_a_wrong_type_are_refused_whatever_else_is_asked(choices: list[Any]) -> None:
    space = {EPOCHS: {"type": "categorical", "choices": choices}}
    problems = broken(sft_body(**search(pruner="median", space=space)))
    assert "makes a trial's request invalid" in problems[f"{WHERE}.space.{EPOCHS}"]


def test_a_trials_request_is_the_request_with_its_values() -> None:
    body = sft_body(runtime={"seed": 3}, training_config__optimizer_config=OPTIMIZER)
    request = read(changed(body, **search(space={RANK: RANKS, LR: RATES})))
    trial = with_values(request, {RANK: 8, LR: 5e-4})
    assert trial == read(changed(body, algorithm_config__rank=8, training_config__optimizer_config__lr=5e-4))
    assert trial.runtime is not None
    assert trial.runtime.model_fields_set == {"seed"}


@pytest.mark.parametrize(
    ("config", "accepted"),
    [
        ({}, True),
        ({"n_trials": 3}, False),
        ({"space": {RANK: RANKS}, "n_trials": 3}, True),
        ({"space": {RANK: RANKS}, "n_trials": 3, "colour": "red"}, False),
        ({"space": {RANK: {"type": "float", "low": 1, "high": 2, "choices": []}}, "n_trials": 3}, False),
        ({"space": {RANK: {"type": "int", "low": 4, "high": 8}}, "n_trials": 3}, True),
    ],
)
def test_the_json_schema_says_what_is_accepted(config: dict[str, Any], accepted: bool) -> None:
    assert jsonschema.Draft202012Validator(search_schema()).is_valid(config) is accepted
    for model in REQUESTS.values():
        schema = model.model_json_schema()["properties"][WHERE]
        assert "$ref" not in json.dumps(schema)
        assert jsonschema.Draft202012Validator(schema).is_valid(config) is accepted
    assert SearchConfig.model_json_schema()["additionalProperties"] is False
