"""Each error of the tree as an HTTP answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from post_training.api.json_body import unreadable
from post_training.errors import (
    BusyError,
    DatasetNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    PostTrainingError,
    RecordUnavailableError,
    RequestTooLargeError,
)
from post_training.schemas.requests import error_details


class ErrorBody(BaseModel):
    """What every refusal but an invalid body answers."""

    detail: str


class BrokenRule(BaseModel):
    """One broken rule: the field's path, the rule with the value, the rule's name."""

    loc: list[str | int]
    msg: str
    type: str


class InvalidBodyErrors(BaseModel):
    """The broken rules, one entry each."""

    errors: list[BrokenRule]


class InvalidBody(BaseModel):
    """What an invalid body answers."""

    detail: InvalidBodyErrors


STATUS_CODES: dict[type[PostTrainingError], int] = {
    InvalidRequestError: 400,
    ForbiddenError: 403,
    JobNotFoundError: 404,
    DatasetNotFoundError: 404,
    JobConflictError: 409,
    RequestTooLargeError: 413,
    RecordUnavailableError: 503,
    BusyError: 503,
}

HEADERS: dict[type[PostTrainingError], dict[str, str]] = {
    # The published client repeats 409 unless it is told not to; the answer would be the same.
    JobConflictError: {"x-should-retry": "false"},
    RecordUnavailableError: {"Retry-After": "10"},
    BusyError: {"Retry-After": "5"},
}


def error_response(error: PostTrainingError) -> JSONResponse:
    """Return the answer to one of our own errors."""
    kind = type(error)
    detail: Any = {"errors": error.errors} if isinstance(error, InvalidRequestError) else str(error)
    return JSONResponse({"detail": detail}, STATUS_CODES[kind], HEADERS.get(kind))


def add_error_handlers(app: FastAPI) -> None:
    """Let the app answer our errors, and an invalid body, by the table above.

    The handlers are coroutines: sync ones would wait for a thread of the pool that Airflow's pages use.
    """

    async def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, PostTrainingError)  # noqa: S101
        return error_response(error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        if (reason := unreadable(request, error.body)) is not None:
            return error_response(InvalidRequestError([{"loc": [], "msg": reason, "type": "json_invalid"}]))
        return error_response(InvalidRequestError(error_details(error.errors())))

    async def by_framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101
        if error.status_code == 400:  # FastAPI's own word for a body that it cannot even parse
            return error_response(
                InvalidRequestError([{"loc": [], "msg": str(error.detail), "type": "json_invalid"}])
            )
        return await http_exception_handler(request, error)

    app.add_exception_handler(HTTPException, by_framework)
    for kind in STATUS_CODES:
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of these error answers."""
    models: dict[int, type[BaseModel]] = {400: InvalidBody}
    return {status: {"model": models.get(status, ErrorBody)} for status in statuses}
