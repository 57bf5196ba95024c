"""Reads the bodies of requests: strict JSON, refused only to callers who are known."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from post_training.schemas.base import load_json


class _Request(Request):
    async def json(self) -> Any:
        """Return the body's value. For what is no JSON it is a text, which no model takes.

        FastAPI reads the body before it asks who calls: an error raised here would be answered with 400 to
        callers who must be answered 401. ``unreadable`` tells why to those who pass.
        """
        try:
            return load_json(await self.body())
        except ValueError as error:
            self.state.unreadable = f"the body is no valid JSON: {error}"
            return ""


class JsonRoute(APIRoute):
    """A route whose body is strict JSON; every router of the API is made with it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's own handler, given a request that reads its body so."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handler


def unreadable(request: Request, body: Any) -> str | None:
    """Return why the body that a validation error quotes could not be read; None if it could."""
    if isinstance(body, bytes):
        given = request.headers.get("content-type", "none")
        return f"the Content-Type must be application/json, got {given[:80]!r}"
    reason: str | None = getattr(request.state, "unreadable", None)
    return reason
