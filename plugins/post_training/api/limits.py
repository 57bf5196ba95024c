"""Bounds what one client may hold: bodies before they are read into memory, and answers it does not read."""

from __future__ import annotations

import logging
from contextlib import suppress

import anyio
import anyio.lowlevel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from post_training.api.errors import error_response
from post_training.errors import RequestTooLargeError

logger = logging.getLogger(__name__)


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


class SendTimeout:
    """ASGI middleware that gives up a client which does not read its answer, and what the answer holds.

    :param seconds: how long the client may take until it has read enough for the next part.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def timely(message: Message) -> None:
            with anyio.move_on_after(self._seconds) as sending:
                await send(message)
            if sending.cancelled_caught:
                # An error would reach the app in groups, and some of it takes errors of sending for its own.
                logger.info("The client has not read for %g s: %s", self._seconds, scope.get("path"))
                serving.cancel()
                await anyio.lowlevel.checkpoint()

        with anyio.CancelScope() as serving:
            await self._app(scope, receive, timely)
