"""Requests as flat params: nothing is lost on the way there and back."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.errors import InvalidRequestError
from post_training.operators.params import FORM_DEFAULTS
from post_training.schemas.flat import DEPLOYMENTS, flatten, leaves, stated, unflatten
from post_training.schemas.requests import (
    AnyTrainingRequest,
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
)
from post_training.schemas.training import EfficiencyConfig
from tests.requests_of import LORA, QAT, dpo_body, sft_body

DEFAULTS = FORM_DEFAULTS["supervised_fine_tune"]
ADAPTER_FORM = {
    path: value
    for path, value in FORM_DEFAULTS["preference_optimize"].items()
    if path.startswith("runtime.adapter.")
}

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
flags = st.none() | st.booleans()
optimizers = st.none() | st.fixed_dictionaries(
    {
        "optimizer_type": st.sampled_from(["adam", "adamw", "sgd"]),
        "lr": st.floats(1e-6, 1),
        "weight_decay": st.floats(0, 1),
        "num_warmup_steps": st.integers(0, 9),
    }
)
efficiencies = st.none() | st.dictionaries(
    st.sampled_from(list(EfficiencyConfig.model_fields)), st.none() | st.booleans()
)
training_configs = st.fixed_dictionaries(
    {"n_epochs": st.integers(1, 9), "data_config": st.just(sft_body()["training_config"]["data_config"])},
    optional={
        "optimizer_config": optimizers,
        "efficiency_config": efficiencies,
        "max_validation_steps": st.none() | st.integers(1, 9),
        "dtype": st.sampled_from([None, "fp32"]),
    },
)
loggers = st.fixed_dictionaries(
    {},
    optional={
        "tags": st.dictionaries(st.text("abc", min_size=1), WORDS),
        "log_model": st.sampled_from([True, "all"]),
        "sample_prompts": st.lists(WORDS.filter(bool), max_size=3),
    },
)


def loras(*, plain: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    further = st.sampled_from([None, False]) if plain else flags
    return st.fixed_dictionaries(
        {name: st.just(value) for name, value in LORA.items() if name != "type"},
        optional={"type": st.just("LoRA"), "use_dora": further, "quantize_base": further},
    )


def runtimes(**further: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any] | None]:
    return st.none() | st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 9),
            "save_total_limit": st.none() | st.integers(1, 9),
            "save_every_n_steps": st.none() | st.integers(1, 9),
            "save_every_n_minutes": st.none() | st.floats(1e-3, 1e3),
            "export": st.none(),
            "reference_logprobs": st.none(),
            "adapter": st.none(),
            **further,
        },
    )


LORA_RUNTIMES = runtimes(export=st.sampled_from([None, "adapter", "merged"]))
QAT_RUNTIMES = runtimes(adapter=st.none() | loras(plain=True))
algorithms_and_runtimes = st.one_of(
    st.tuples(st.none(), runtimes()),
    st.tuples(loras().map(lambda lora: {"type": "LoRA", **lora}), LORA_RUNTIMES),
    st.tuples(st.just(QAT), QAT_RUNTIMES),
)
preference_runtimes = st.one_of(
    runtimes(reference_logprobs=st.sampled_from([None, "precomputed"])),
    st.tuples(
        runtimes(
            export=st.sampled_from([None, "adapter", "merged"]),
            reference_logprobs=st.sampled_from([None, "precomputed", "live"]),
        ),
        loras(),
    ).map(lambda both: {**(both[0] or {}), "adapter": both[1]}),
)


def there_and_back(request: AnyTrainingRequest, form_defaults: dict[str, Any]) -> AnyTrainingRequest:
    model = type(request)
    flat = flatten(request)
    assert set(flat) == set(leaves(model))
    nested = unflatten(model, flat, form_defaults=form_defaults)
    return model.model_validate({"job_uuid": request.job_uuid, **nested})


def same(first: AnyTrainingRequest, second: AnyTrainingRequest) -> bool:
    """Whether both ask for the same, also where the deployment's defaults fill what is unset."""
    said = [request.runtime and request.runtime.model_fields_set for request in (first, second)]
    return first == second and said[0] == said[1] and first.payload_hash() == second.payload_hash()


@given(
    training=training_configs, both=algorithms_and_runtimes, logger=loggers, model=st.none() | st.just("m")
)
def test_flat_and_back_is_the_same_request(
    training: dict[str, Any], both: tuple[Any, Any], logger: dict[str, Any], model: str | None
) -> None:
    algorithm, runtime = both
    body = sft_body(algorithm_config=algorithm, runtime=runtime, logger_config=logger, model=model)
    request = SupervisedFineTuneRequest.model_validate({**body, "training_config": training})
    assert same(there_and_back(request, DEFAULTS), request)


@given(
    training=training_configs,
    runtime=preference_runtimes,
    logger=loggers,
    clip=st.none() | st.floats(0.1, 9),
)
def test_a_preference_request_survives_too(
    training: dict[str, Any], runtime: Any, logger: dict[str, Any], clip: float | None
) -> None:
    body = dpo_body(algorithm_config__reward_clip=clip, runtime=runtime, logger_config=logger)
    request = PreferenceOptimizeRequest.model_validate({**body, "training_config": training})
    assert same(there_and_back(request, FORM_DEFAULTS["preference_optimize"]), request)


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


@pytest.mark.parametrize(
    ("model", "body", "group"),
    [
        (SupervisedFineTuneRequest, sft_body(algorithm_config=None), "algorithm_config"),
        (PreferenceOptimizeRequest, dpo_body(), "runtime.adapter"),
    ],
)
def test_a_field_of_no_type_is_left_out_at_the_forms_default_and_refused_when_changed(
    model: type[AnyTrainingRequest], body: dict[str, Any], group: str
) -> None:
    defaults = FORM_DEFAULTS[model.method]
    flat = {**flatten(model.model_validate(body)), f"{group}.type": None}
    untouched = {**flat, f"{group}.rank": defaults[f"{group}.rank"]}
    nested = unflatten(model, untouched, form_defaults=defaults)
    assert reduce(lambda body, name: (body or {}).get(name), group.split("."), nested) is None
    with pytest.raises(
        InvalidRequestError, match=rf"{group}\.rank: belongs to LoRA, but {group}\.type is null"
    ):
        unflatten(model, {**flat, f"{group}.rank": 64}, form_defaults=defaults)
    with pytest.raises(InvalidRequestError, match=rf"{group}\.type: must be LoRA.*, got 'ORPO'"):
        unflatten(model, {**flat, f"{group}.type": "ORPO"}, form_defaults=defaults)


@pytest.mark.parametrize(
    ("chosen", "runtime"),
    [
        ("LoRA", {"adapter": {name.rpartition(".")[2]: value for name, value in ADAPTER_FORM.items()}}),
        (None, {"adapter": None}),
        (DEPLOYMENTS, None),
    ],
)
def test_the_adapters_of_a_form_are_set_none_or_the_deployments(chosen: str | None, runtime: Any) -> None:
    flat = {**flatten(PreferenceOptimizeRequest.model_validate(dpo_body())), **ADAPTER_FORM}
    flat["runtime.adapter.type"] = chosen
    nested = unflatten(PreferenceOptimizeRequest, flat, form_defaults=FORM_DEFAULTS["preference_optimize"])
    assert nested.get("runtime") == runtime


def test_a_flat_request_need_not_name_every_field() -> None:
    flat = flatten(PreferenceOptimizeRequest.model_validate(dpo_body(runtime={"seed": 3})))
    named = {path: value for path, value in flat.items() if value is not None and "adapter" not in path}
    assert unflatten(PreferenceOptimizeRequest, named, form_defaults={})["runtime"] == {"seed": 3}


def test_stated_is_what_says_something() -> None:
    assert "runtime.adapter.type" not in stated(PreferenceOptimizeRequest.model_validate(dpo_body()))
    adapted = stated(PreferenceOptimizeRequest.model_validate(dpo_body(runtime={"adapter": LORA})))
    assert adapted["runtime.adapter.type"] == "LoRA"
    assert None not in adapted.values()
