"""From what an operator and its connection were given to the request of its task's job."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from post_training.errors import InvalidRequestError
from post_training.operators.params import FORM_DEFAULTS
from post_training.schemas.flat import unflatten
from post_training.schemas.record import CONF_MLFLOW_RUN
from post_training.schemas.requests import REQUESTS, AnyTrainingRequest, error_details
from post_training.schemas.rlhf import read_request
from post_training.schemas.rules import unsupported

logger = logging.getLogger(__name__)


def build_request(
    method: str, job_uuid: str, whole: Mapping[str, Any] | str | None, fields: Mapping[str, Any]
) -> AnyTrainingRequest:
    """Validate what was given.

    :param whole: the request, nested (a preference job's in either form) or with dotted keys, or a JSON
        string of it.
    :param fields: single fields; None stands for what was not given.
    :raises InvalidRequestError: naming each field, rule and value.
    """
    given = _given(REQUESTS[method], whole, fields)
    body = {"hyperparam_search_config": {}, "logger_config": {}, **given}
    if body.setdefault("job_uuid", job_uuid) != job_uuid:
        raise InvalidRequestError.of(
            "job_uuid", f"must be left out or be {job_uuid!r}, the id of this task's job"
        )
    # Templates render to strings unless the DAG renders native objects, so numbers may come as text.
    try:
        return read_request(method, body, strict=False)
    except ValidationError as error:
        raise InvalidRequestError(error_details(error.errors())) from None


def with_runtime_defaults(request: AnyTrainingRequest, defaults: Mapping[str, Any]) -> AnyTrainingRequest:
    """Return the request with these values where its runtime block leaves a field unset.

    A deployment has one set of defaults for jobs of every kind: one that means nothing for this job, as
    adapters do for a LoRA job, is left out. So is ``export: adapter``: null exports the adapter too, unless
    the job starts from one, which only the trainer finds out.

    :raises InvalidRequestError: naming each field, rule and value.
    """
    defaults = {key: value for key, value in defaults.items() if (key, value) != ("export", "adapter")}
    given = request.runtime.model_dump(exclude_unset=True) if request.runtime is not None else {}
    try:
        return type(request).model_validate({**dict(request), "runtime": {**defaults, **given}})
    except ValidationError as error:
        refused = {str(detail["loc"][1]) for detail in error.errors() if detail["loc"][:1] == ("runtime",)}
        unfit = refused & defaults.keys() - given.keys()
        if not unfit:
            raise InvalidRequestError(error_details(error.errors())) from None
        logger.info("Defaults of the connection that mean nothing for this job: %s", ", ".join(sorted(unfit)))
        return with_runtime_defaults(request, {k: v for k, v in defaults.items() if k not in unfit})


def with_checked_defaults(request: AnyTrainingRequest, defaults: Mapping[str, Any]) -> AnyTrainingRequest:
    """Return the request with a deployment's defaults, if that is a job that a deployment can run.

    What means nothing by itself, as several nodes do, may mean something with them.

    :raises InvalidRequestError: naming each field, rule and value.
    """
    merged = with_runtime_defaults(request, defaults)
    if problems := unsupported(merged):
        raise InvalidRequestError(problems)
    return merged


def _given(
    model: type[AnyTrainingRequest], whole: Mapping[str, Any] | str | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    single = {name: value for name, value in fields.items() if value is not None}
    if whole is None:
        return single
    if single:
        raise InvalidRequestError.of(next(iter(single)), "was given beside request: give one of them")
    given = _parsed(whole)
    given.pop(CONF_MLFLOW_RUN, None)
    if any("." in name for name in given):
        return unflatten(model, given, form_defaults=FORM_DEFAULTS[model.method])
    return given


def _parsed(whole: Mapping[str, Any] | str) -> dict[str, Any]:
    """Read a request that may be a JSON string.

    :raises InvalidRequestError: if it is no object.
    """
    if not isinstance(whole, str):
        return dict(whole)
    try:
        value = json.loads(whole)
    except json.JSONDecodeError as error:
        raise InvalidRequestError.of(
            "request",
            f"must be an object or a JSON string of one: {error}; a DAG without"
            " render_template_as_native_obj=True renders objects as Python text, use a tojson filter there",
        ) from None
    if not isinstance(value, dict):
        raise InvalidRequestError.of("request", f"must be an object, got {type(value).__name__}")
    return value


def was_there(error: InvalidRequestError) -> bool:
    """Whether all that is wrong is that something is not found, which was there when the job was accepted."""
    return all(detail["type"] == "not_found" for detail in error.errors)
