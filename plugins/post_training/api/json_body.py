"""Reads the bodies of requests: strict JSON, refused only to callers who are known."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope

from post_training.schemas.base import load_json

QUICK_BYTES = 64 * 2**10
"""A larger body is parsed in a thread: the event loop is that of all of Airflow's pages."""


class _Request(Request):
    def __init__(self, scope: Scope, receive: Receive, turns: anyio.CapacityLimiter) -> None:
        super().__init__(scope, receive)
        self._turns = turns

    async def json(self) -> Any:
        """Return the body's value. For what is no JSON it is a text, which no model takes.

        FastAPI reads the body before it asks who calls: an error raised here would be answered with 400 to
        callers who must be answered 401. ``unreadable`` tells why to those who pass.
        """
        body = await self.body()
        try:
            if len(body) <= QUICK_BYTES:
                return load_json(body)
            return await anyio.to_thread.run_sync(load_json, body, limiter=self._turns)
        except ValueError as error:
            self.state.unreadable = f"the body is no valid JSON: {error}"
            return ""


class JsonRoute(APIRoute):
    """A route whose body is strict JSON; every router of the API is made with it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's own handler, given a request that reads its body so."""
        handle = super().get_route_handler()
        turns = anyio.CapacityLimiter(1)  # not the pool's threads, which Airflow's own pages need

        async def handler(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive, turns))

        return handler


def unreadable(request: Request, body: Any) -> str | None:
    """Return why the body that a validation error quotes could not be read; None if it could."""
    if isinstance(body, bytes):
        given = request.headers.get("content-type", "none")
        return f"the Content-Type must be application/json, got {given[:80]!r}"
    reason: str | None = getattr(request.state, "unreadable", None)
    return reason
