"""Requests as flat params: nothing is lost on the way there and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.errors import InvalidRequestError
from post_training.operators.params import FORM_DEFAULTS
from post_training.schemas.flat import flatten, leaves, unflatten
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from tests.requests_of import LORA, dpo_body, sft_body

DEFAULTS = FORM_DEFAULTS["supervised_fine_tune"]

optimizers = st.none() | st.fixed_dictionaries(
    {
        "optimizer_type": st.sampled_from(["adam", "adamw", "sgd"]),
        "lr": st.floats(1e-6, 1),
        "weight_decay": st.floats(0, 1),
        "num_warmup_steps": st.integers(0, 9),
    }
)
QAT = {"type": "QAT", "quantizer_name": "int4_weight_only", "group_size": 32}
algorithms = st.sampled_from([None, LORA, QAT])
runtime_fields = st.sampled_from(["seed", "max_seq_length", "save_total_limit"])
runtimes = st.none() | st.dictionaries(runtime_fields, st.integers(8, 99), min_size=1)


@given(
    optimizer=optimizers,
    algorithm=algorithms,
    runtime=runtimes,
    validation_steps=st.none() | st.integers(0, 9),
    tags=st.dictionaries(st.text("abc", min_size=1), st.text()),
)
def test_flat_and_back_is_the_same_request(
    optimizer: Any, algorithm: Any, runtime: Any, validation_steps: int | None, tags: dict[str, str]
) -> None:
    body = sft_body(
        training_config__optimizer_config=optimizer,
        training_config__max_validation_steps=validation_steps,
        algorithm_config=algorithm,
        runtime=runtime,
        logger_config={"tags": tags},
    )
    request = SupervisedFineTuneRequest.model_validate(body)
    flat = flatten(request)
    assert set(flat) == set(leaves(SupervisedFineTuneRequest))
    nested = unflatten(SupervisedFineTuneRequest, flat, form_defaults=DEFAULTS)
    again = SupervisedFineTuneRequest.model_validate({"job_uuid": request.job_uuid, **nested})
    assert again == request
    assert (again.runtime and again.runtime.model_fields_set) == (
        request.runtime and request.runtime.model_fields_set
    )


def test_a_preference_request_survives_too() -> None:
    request = PreferenceOptimizeRequest.model_validate(dpo_body(algorithm_config__reward_clip=5.0))
    nested = unflatten(PreferenceOptimizeRequest, flatten(request), form_defaults={})
    assert PreferenceOptimizeRequest.model_validate({"job_uuid": "job-1", **nested}) == request


def test_groups_become_dotted_keys() -> None:
    flat = flatten(SupervisedFineTuneRequest.model_validate(sft_body()))
    assert flat["training_config.data_config.batch_size"] == 2
    assert flat["algorithm_config.rank"] == 4
    assert flat["training_config.optimizer_config.lr"] is None
    assert flat["logger_config"] == {}
    assert "job_uuid" not in flat


def test_an_unknown_key_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="training_config: unknown parameter"):
        unflatten(SupervisedFineTuneRequest, {"training_config": {}}, form_defaults=DEFAULTS)


def test_another_algorithms_field_is_left_out_at_its_default_and_refused_when_changed() -> None:
    flat = flatten(SupervisedFineTuneRequest.model_validate(sft_body(algorithm_config=None)))
    untouched = {**flat, "algorithm_config.rank": DEFAULTS["algorithm_config.rank"]}
    nested = unflatten(SupervisedFineTuneRequest, untouched, form_defaults=DEFAULTS)
    assert nested.get("algorithm_config") is None
    with pytest.raises(InvalidRequestError, match=r"algorithm_config\.rank: belongs to LoRA"):
        unflatten(SupervisedFineTuneRequest, {**flat, "algorithm_config.rank": 64}, form_defaults=DEFAULTS)
