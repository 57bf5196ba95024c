"""The form's fields, and the request that a filled one stands for."""

from __future__ import annotations

from typing import Any

import pytest

from post_training.errors import InvalidRequestError
from post_training.job_form import form_of, request_of, values_of
from post_training.schemas.flat import DEPLOYMENTS, flatten, leaves
from post_training.schemas.requests import REQUESTS
from post_training.schemas.views import Form, FormSubmit
from tests.requests_of import dpo_body, sft_body

BODIES = {"supervised_fine_tune": sft_body, "preference_optimize": dpo_body}


def filled(form: Form, **changes: Any) -> FormSubmit:
    """Return the form as a browser sends it untouched, but for these fields."""
    chosen = {field.path: field.value for field in form.fields}
    values = {
        field.path: field.value
        for field in form.fields
        if not field.types or chosen[field.chosen_by] in field.types
    }
    return FormSubmit(method=form.method, job_uuid="from-form", fields=values | changes)


@pytest.mark.parametrize("method", REQUESTS)
def test_every_field_of_a_request_is_in_its_form(method: str) -> None:
    form = form_of(method)
    assert {field.path for field in form.fields} == set(leaves(REQUESTS[method]))
    for field in form.fields:
        assert field.json_schema["description"], field.path
        assert field.json_schema["title"]
        assert field.section


def test_what_must_be_given_is_marked() -> None:
    required = {field.path for field in form_of("preference_optimize").fields if field.required}
    assert required == {"finetuned_model", "training_config.data_config.dataset_id"}


@pytest.mark.parametrize("method", REQUESTS)
def test_a_form_with_its_required_fields_alone_is_a_request(method: str) -> None:
    given = {"training_config.data_config.dataset_id": "rows.jsonl"}
    if method == "preference_optimize":
        given["finetuned_model"] = "org/model"
    request = request_of(filled(form_of(method), **given))
    assert request.job_uuid == "from-form"
    assert request.training_config.data_config is not None
    assert request.training_config.data_config.batch_size == 4
    assert request.adapters is not None
    assert request.adapters.rank == 8


def test_numbers_may_come_as_text() -> None:
    texts = {"training_config.data_config.dataset_id": "r.jsonl", "training_config.n_epochs": "3"}
    assert request_of(filled(form_of("supervised_fine_tune"), **texts)).training_config.n_epochs == 3


@pytest.mark.parametrize(
    ("changes", "loc"),
    [
        ({"training_config.n_epochs": "0"}, ["training_config", "n_epochs"]),
        ({"training_config.data_config.dataset_id": None}, ["training_config", "data_config", "dataset_id"]),
        ({"algorithm_config.rank": "many"}, ["algorithm_config", "rank"]),
        ({"logger_config": {"log_model": 3}}, ["logger_config", "log_model"]),
    ],
)
def test_an_error_names_the_field_as_the_form_does(changes: dict[str, Any], loc: list[str]) -> None:
    given = {"training_config.data_config.dataset_id": "rows.jsonl", **changes}
    with pytest.raises(InvalidRequestError) as refused:
        request_of(filled(form_of("supervised_fine_tune"), **given))
    assert [error["loc"] for error in refused.value.errors] == [loc]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="must be supervised_fine_tune or preference_optimize"):
        request_of(FormSubmit(method="pretrain", job_uuid="x", fields={}))


@pytest.mark.parametrize("method", REQUESTS)
def test_a_clone_of_a_form_is_the_same_request(method: str) -> None:
    request = REQUESTS[method].model_validate(BODIES[method](job_uuid="from-form"))
    for held in (flatten(request), request.model_dump(mode="json")):
        again = request_of(filled(form_of(method, values_of(method, held))))
        assert again.payload_hash() == request.payload_hash()


def test_what_an_earlier_version_recorded_is_shown_as_far_as_it_fits() -> None:
    body = sft_body() | {"gone": 1}
    values = values_of("supervised_fine_tune", body)
    assert values["algorithm_config.rank"] == 4
    fields = {field.path: field.value for field in form_of("supervised_fine_tune", values).fields}
    assert fields["algorithm_config.rank"] == 4
    assert "gone" not in fields


def test_a_clone_of_an_earlier_version_s_full_fine_tuning_is_no_lora() -> None:
    body = sft_body(algorithm_config=None, gone=1, training_config__n_epochs=3)
    form = form_of("supervised_fine_tune", values_of("supervised_fine_tune", body))
    fields = {field.path: field.value for field in form.fields}
    assert fields["runtime.adapter.type"] == DEPLOYMENTS
    assert fields["training_config.max_validation_steps"] is None
    request = request_of(filled(form))
    assert request.adapters is None
    assert request.training_config.n_epochs == 3


def test_a_clone_without_adapters_of_the_deployment_stays_so() -> None:
    body = sft_body(algorithm_config=None, gone=1, runtime={"adapter": None})
    assert values_of("supervised_fine_tune", body)["runtime.adapter.type"] is None


def test_a_run_that_was_triggered_with_a_part_of_the_fields_had_the_defaults_of_the_others() -> None:
    values = values_of("supervised_fine_tune", {"training_config.n_epochs": 3})
    fields = {field.path: field.value for field in form_of("supervised_fine_tune", values).fields}
    assert (fields["training_config.n_epochs"], fields["algorithm_config.type"]) == (3, "LoRA")
