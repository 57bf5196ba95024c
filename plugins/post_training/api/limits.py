"""Refuses request bodies over the limit before they are read into memory."""

from __future__ import annotations

from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from post_training.api.errors import error_response
from post_training.errors import RequestTooLargeError


class _BodyTooLargeError(Exception):
    """Ends the reading of a body."""


class BodyLimit:
    """ASGI middleware that answers 413 to a body over the limit, announced or not.

    :param max_bytes: largest body in bytes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        received = 0
        answered = False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise _BodyTooLargeError
            return message

        async def watched(message: Message) -> None:
            # FastAPI answers an error of reading the body with a 400 of its own, which must not go out.
            nonlocal answered
            if received <= self._max_bytes:
                answered = True
                await send(message)

        with suppress(_BodyTooLargeError):
            await self._app(scope, counted, watched)
        if received > self._max_bytes and not answered:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestTooLargeError(f"the request body may have {self._max_bytes} bytes")
        await error_response(error)(scope, receive, send)
