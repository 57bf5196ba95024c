"""The long form of a preference job is the same job as its short form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from post_training.schemas.flat import flatten
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest, error_details
from post_training.schemas.rlhf import PostTrainingRLHFRequest, is_long_form, read_request
from tests.requests_of import LORA, OPTIMIZER, dpo_body, rlhf_body, sft_body

SHORT = dpo_body(
    training_config={
        "n_epochs": 1,
        "data_config": {
            "dataset_id": "train.jsonl",
            "validation_dataset_id": "test.jsonl",
            "batch_size": 4,
            "shuffle": True,
            "data_format": "instruct",
        },
        "optimizer_config": OPTIMIZER,
    }
)
OWN_DATA = {
    "dataset_id": "train.jsonl",
    "batch_size": 7,
    "shuffle": False,
    "data_format": "dialog",
    "packed": True,
}


def read(body: dict[str, Any]) -> PreferenceOptimizeRequest:
    request = read_request("preference_optimize", body)
    assert isinstance(request, PreferenceOptimizeRequest)
    return request


def broken(body: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        read(body)
    return {".".join(map(str, e["loc"])): e["msg"] for e in error_details(caught.value.errors())}


def test_both_forms_are_one_request() -> None:
    short, long = read(SHORT), read(rlhf_body())
    assert dict(long) == dict(short)
    assert long.payload_hash() == short.payload_hash()
    assert flatten(long) == flatten(short)


@pytest.mark.parametrize("runtime", [None, {}, {"seed": 3}, {"adapter": None}, {"adapter": LORA}])
def test_runtime_is_taken_over_as_it_was_set(runtime: Any) -> None:
    short, long = read(SHORT | {"runtime": runtime}), read(rlhf_body(runtime=runtime))
    assert flatten(long) == flatten(short)
    assert long.payload_hash() == short.payload_hash()


def test_what_the_long_form_makes_is_valid_by_itself() -> None:
    request = PostTrainingRLHFRequest.model_validate(rlhf_body(runtime={"adapter": LORA}))
    short = request.to_preference_optimize()
    again = PreferenceOptimizeRequest.model_validate(short.model_dump(mode="json", exclude_unset=True))
    assert (dict(again), again.model_fields_set) == (dict(short), short.model_fields_set)


def test_configs_may_be_json_strings() -> None:
    body = rlhf_body(runtime={"seed": 3})
    names = ("training_config", "algorithm_config", "logger_config", "hyperparam_search_config", "runtime")
    assert read(body | {name: json.dumps(body[name]) for name in names}) == read(body)


def test_training_config_completes_what_stands_above_it() -> None:
    body = rlhf_body(training_config__data_config=OWN_DATA, training_config__optimizer_config=OPTIMIZER)
    data = read(body).training_config.data_config
    assert data is not None
    assert data.model_dump(mode="json") == {
        **OWN_DATA,
        "validation_dataset_id": "test.jsonl",
        "train_on_input": False,
    }


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (
            {"training_config__data_config": OWN_DATA | {"dataset_id": "other.jsonl"}},
            "dataset_id",
            "must be the same as training_config.data_config.dataset_id 'other.jsonl', got 'train.jsonl'",
        ),
        (
            {"training_config__data_config": OWN_DATA | {"validation_dataset_id": "{other}"}},
            "validation_dataset_id",
            "as training_config.data_config.validation_dataset_id '{other}', got 'test.jsonl'",
        ),
        (
            {"training_config__optimizer_config": OPTIMIZER | {"lr": 1e-3}},
            "optimizer_config",
            "must be the same as training_config.optimizer_config",
        ),
        ({"algorithm": "ppo"}, "algorithm", "'dpo', got 'ppo'"),
        ({"finetuned_model": {"uri": ""}}, "finetuned_model.uri", "at least 1 character"),
        ({"finetuned_model": "org/model"}, "finetuned_model", "valid dictionary"),
        ({"optimizer_config": ...}, "optimizer_config", "Field required"),
        ({"algorithm": ...}, "algorithm", "Field required"),
        ({"colour": "red"}, "colour", "Extra inputs"),
        ({"training_config__n_epochs": "1"}, "training_config.n_epochs", "valid integer, got '1'"),
        (
            {"training_config__data_config": OWN_DATA | {"train_on_input": True}},
            "training_config.data_config.train_on_input",
            "must be false",
        ),
        ({"runtime": {"export": "merged"}}, "runtime.export", "trains none, got 'merged'"),
        ({"logger_config": {"log_model": False}}, "logger_config.log_model", "got False"),
    ],
)
def test_refusals_name_the_field_of_the_form_that_was_given(
    changes: dict[str, Any], field: str, message: str
) -> None:
    told = broken(rlhf_body(**changes))
    assert list(told) == [field]
    assert message in told[field]


def test_contradictions_and_broken_rules_are_told_at_once() -> None:
    other = OWN_DATA | {"dataset_id": "a", "validation_dataset_id": "b", "train_on_input": True}
    assert set(broken(rlhf_body(training_config__data_config=other))) == {
        "dataset_id",
        "validation_dataset_id",
        "training_config.data_config.train_on_input",
    }


def test_half_characters_are_refused() -> None:
    with pytest.raises(ValidationError, match="valid Unicode"):
        read(rlhf_body(dataset_id="\ud800"))


def test_text_is_read_where_templates_render_it() -> None:
    body = rlhf_body(training_config__n_epochs="2", optimizer_config__lr="0.01")
    request = read_request("preference_optimize", body, strict=False)
    assert request.training_config.n_epochs == 2
    assert request.training_config.optimizer_config is not None
    assert request.training_config.optimizer_config.lr == 0.01


def test_the_forms_are_told_apart() -> None:
    assert is_long_form(rlhf_body())
    assert not is_long_form(dpo_body())
    assert not is_long_form([])
    # One stray field of the other form is that: a stray field.
    assert list(broken(dpo_body(dataset_id="train.jsonl"))) == ["dataset_id"]
    with pytest.raises(ValidationError, match="algorithm\n"):
        read_request("supervised_fine_tune", sft_body(algorithm="dpo"))
    assert isinstance(read_request("supervised_fine_tune", sft_body()), SupervisedFineTuneRequest)
