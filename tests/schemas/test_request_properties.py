"""What holds for every request: bodies near valid ones, one or two fields replaced by hostile values."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from post_training.schemas.flat import flatten, unflatten
from post_training.schemas.requests import REQUESTS, AnyTrainingRequest, error_details
from tests.hostile import near, paths
from tests.requests_of import LORA, OPTIMIZER, QAT, changed, dpo_body, sft_body

RUNTIME = {"seed": 3, "max_seq_length": 128, "save_total_limit": 2, "max_bad_row_fraction": 0.5}
LOGGER = {"experiment_name": "e", "run_name": "r", "tags": {"team": "a"}, "log_every_n_steps": 2}
SEARCH = {
    "space": {
        "training_config.optimizer_config.lr": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True},
        "algorithm_config.rank": {"type": "int", "low": 4, "high": 8, "step": 2},
        "algorithm_config.alpha": {"type": "categorical", "choices": [8, 16]},
    },
    "n_trials": 3,
    "max_parallel": 2,
}
FULL: dict[str, Any] = {
    "training_config__optimizer_config": OPTIMIZER,
    "runtime": RUNTIME,
    "logger_config": LOGGER,
}
VALID = {
    "supervised_fine_tune": [
        sft_body(**FULL),
        sft_body(algorithm_config=QAT, runtime={"adapter": LORA}),
        sft_body(algorithm_config=None, training_config__data_config__packed=True),
        sft_body(training_config__optimizer_config=OPTIMIZER, hyperparam_search_config=SEARCH),
    ],
    "preference_optimize": [dpo_body(**FULL), dpo_body(runtime={"adapter": LORA})],
}
RULES = {"unsupported", "value_error", "string_unicode", "json_invalid", "job_uuid", "search"}
"""Types of error that a JSON schema cannot say."""

bounded = settings(
    max_examples=400,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
bodies = st.sampled_from(sorted(VALID)).flatmap(
    lambda method: st.tuples(st.just(method), st.one_of(*(near(body, ["job-1"]) for body in VALID[method])))
)


def read(method: str, body: Any) -> AnyTrainingRequest | list[Any]:
    """Return the request, or the broken rules. Any other error than ValidationError ends the test."""
    try:
        return REQUESTS[method].model_validate(body)
    except ValidationError as error:
        return list(error_details(error.errors()))


def reordered(value: Any) -> Any:
    """Return the same JSON with every object's names in the opposite order."""
    if isinstance(value, list):
        return [reordered(item) for item in value]
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(value)}
    return value


@pytest.mark.parametrize(("method", "body"), [(method, body) for method in VALID for body in VALID[method]])
def test_the_bodies_to_start_from_are_valid(method: str, body: dict[str, Any]) -> None:
    assert not isinstance(read(method, body), list)


@pytest.mark.parametrize("method", VALID)
def test_an_unknown_field_is_refused_wherever_it_stands(method: str) -> None:
    """So is one that would switch something off, like the trust in a model's code."""
    body = VALID[method][0]
    groups = [path for path in paths(body) if isinstance(at(body, path), dict)]
    assert {"training_config__data_config", "algorithm_config", "runtime"} <= set(groups)
    for path in ["trust_remote_code", *(f"{group}__trust_remote_code" for group in groups)]:
        if path.startswith("logger_config__tags__"):
            continue  # the caller's own
        errors = read(method, changed(body, **{path: True}))
        named = [error for error in errors if "trust_remote_code" in (*error["loc"], *error["msg"].split())]
        searches = path.startswith("hyperparam_search_config")  # with this alone it lacks what it requires
        assert len(named) == 1, errors
        assert errors == named or searches, errors


def at(body: Any, path: str) -> Any:
    for name in path.split("__"):
        body = body[name]
    return body


@bounded
@given(pair=bodies)
def test_an_accepted_request_is_the_same_in_every_form(pair: tuple[str, dict[str, Any]]) -> None:
    method, body = pair
    request = read(method, body)
    if isinstance(request, list):
        return
    model = REQUESTS[method]
    assert model.model_validate(json.loads(request.model_dump_json())) == request
    assert model.model_validate_json(request.model_dump_json()) == request
    flat = json.loads(json.dumps(flatten(request)))
    nested = unflatten(model, flat, form_defaults={}) | {"job_uuid": request.job_uuid}
    assert model.model_validate(nested) == request


@bounded
@given(pair=bodies)
def test_the_payloads_hash_is_of_what_it_says(pair: tuple[str, dict[str, Any]]) -> None:
    method, body = pair
    request = read(method, body)
    if isinstance(request, list):
        return
    groups = ("training_config", "algorithm_config", "runtime", "logger_config")
    as_text = {
        name: json.dumps(value) if name in groups and isinstance(value, dict) else value
        for name, value in body.items()
    }
    for same in (reordered(body), as_text, request.model_dump(mode="json")):
        other = read(method, same)
        assert not isinstance(other, list)
        assert other.payload_hash() == request.payload_hash()
    changed = request.model_copy(update={"job_uuid": "job-2"})
    assert changed.payload_hash() != request.payload_hash()


@bounded
@given(pair=bodies)
def test_a_refusal_names_the_field_and_the_rule(pair: tuple[str, dict[str, Any]]) -> None:
    method, body = pair
    errors = read(method, body)
    if not isinstance(errors, list):
        return
    assert errors
    known = {*REQUESTS[method].model_fields, *body}
    for error in errors:
        assert error["loc"][:1] == [] or error["loc"][0] in known, error
        assert error["loc"] or error["type"] in RULES, error
        assert 0 < len(error["msg"]) < 500, error
        json.dumps(error, ensure_ascii=False).encode()


@pytest.mark.parametrize("method", REQUESTS)
def test_what_the_schema_describes_is_what_the_model_accepts(method: str) -> None:
    """What the model takes, the schema describes; it refuses more by rules that no schema can say.

    One of them: data_config, which may be absent in the published schema, is required.
    """
    validator = jsonschema.Draft202012Validator(REQUESTS[method].model_json_schema())
    compared = {(True, True): 0, (True, False): 0, (False, False): 0}

    @bounded
    @given(body=st.one_of(*(near(body, ["job-1"]) for body in VALID[method])))
    def compare(body: dict[str, Any]) -> None:
        result = read(method, body)
        described, accepted = validator.is_valid(body), not isinstance(result, list)
        compared[described, accepted] += 1
        if described and isinstance(result, list):
            beyond = [error for error in result if error["type"] not in RULES]
            assert all(error["loc"] == ["training_config", "data_config"] for error in beyond), beyond

    compare()
    assert all(compared.values()), compared
