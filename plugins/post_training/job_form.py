"""The form that submits: the fields of Airflow's own trigger form, and how a filled one becomes a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.sdk import Param
from pydantic import ValidationError

from post_training.errors import InvalidRequestError
from post_training.operators.params import request_params
from post_training.operators.request import build_request
from post_training.schemas.flat import Leaf, flatten, flatten_body, leaves
from post_training.schemas.requests import REQUESTS, AnyTrainingRequest
from post_training.schemas.rlhf import read_request
from post_training.schemas.views import Form, FormField, FormSubmit

TITLES = {
    "supervised_fine_tune": "Supervised fine-tuning",
    "preference_optimize": "Preference optimization (DPO)",
}


def form_of(method: str, values: Mapping[str, Any] | None = None) -> Form:
    """Return the form of a training method.

    :param values: shown instead of the defaults, by dotted path.
    """
    model, shown = REQUESTS[method], values or {}
    known = leaves(model)
    return Form(
        method=method,
        title=TITLES[method],
        fields=[_field(known[path], param, shown) for path, param in request_params(model).items()],
    )


def _field(leaf: Leaf, param: Param, values: Mapping[str, Any]) -> FormField:
    default, types = param.dump()["value"], param.schema["type"]
    return FormField(
        path=leaf.path,
        section=param.schema["section"],
        json_schema={
            **{key: value for key, value in param.schema.items() if key != "section"},
            "description": param.description,
        },
        value=values.get(leaf.path, default),
        required=default is None and "null" not in (types if isinstance(types, list) else [types]),
        types=list(leaf.tags) if not leaf.chooses else [],
        chosen_by=leaf.chosen_by if not leaf.chooses else "",
    )


def values_of(method: str, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job's request as the form shows it.

    :param request: with dotted keys, as it is, of which Airflow takes those that are missing from the form's
        defaults; or nested, where what is missing was not asked for.
    """
    model = REQUESTS[method]
    if not request or any("." in name for name in request):
        return {path: value for path, value in request.items() if path in leaves(model)}
    try:
        return flatten(read_request(method, dict(request)))
    except ValidationError:  # an earlier version's request, of which the form can show what still fits
        return flatten_body(model, request)


def request_of(submit: FormSubmit) -> AnyTrainingRequest:
    """Return the request that a filled form stands for.

    :raises InvalidRequestError: naming each field, rule and value.
    """
    if submit.method not in REQUESTS:
        raise InvalidRequestError.of("method", f"must be {' or '.join(REQUESTS)}, got {submit.method[:80]!r}")
    return build_request(submit.method, submit.job_uuid, submit.fields, {})
