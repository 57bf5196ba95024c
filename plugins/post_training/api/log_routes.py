"""The routes of a job's log: its pages as JSON, and the log as it grows as server-sent events.

Both have the same paths; a caller that accepts ``text/event-stream`` gets the events
(https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from post_training.api.capacity import Capacity, threaded_routes
from post_training.api.errors import documented
from post_training.api.log_stream import Pace, follow
from post_training.api.routes import JobUuidQuery
from post_training.errors import PostTrainingError
from post_training.logs import MAX_PAGE_LINES, Cursor, LogService, Step
from post_training.schemas.jobs import PostTrainingJobLogStream

logger = logging.getLogger(__name__)

EVENT_STREAM = "text/event-stream"

Offset = Annotated[
    int,
    Query(ge=0, le=2**31 - 1, description="Lines to leave out at the beginning, over all attempts."),
]
Limit = Annotated[
    int, Query(ge=1, le=MAX_PAGE_LINES, description="Largest number of lines in the answer, or in one event.")
]
LastEventId = Annotated[int | None, Header(ge=0, le=2**31 - 1)]

_STREAM = {
    "description": "The page; with `Accept: text/event-stream`, the log as it grows over all attempts: `log` "
    "events with lines, their `id` the offset of the next line, and last a `status` event with the job's "
    "final status.",
    "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
}


_RESUMES = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "description": "With `Accept: text/event-stream`: of a stream that was cut, which goes on there.",
}


class EventStreamRoute(APIRoute):
    """A route of those callers alone that accept an event stream."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match the path and the header ``Accept``."""
        accepted = Headers(scope=scope).get("accept", "") if scope["type"] == "http" else ""
        kinds = {kind.partition(";")[0].strip().lower() for kind in accepted.split(",")}
        return super().matches(scope) if EVENT_STREAM in kinds else (Match.NONE, {})


def log_routes(
    logs: LogService, current_access: Callable[..., Any], capacity: Capacity, pace: Pace
) -> APIRouter:
    """Return the routes of both shapes.

    :param pace: how often a follower looks.
    """
    streams = APIRouter(route_class=EventStreamRoute)
    pages = APIRouter(tags=["jobs"], route_class=threaded_routes(capacity.log_readers))
    for path, named in (("/job/logs", _by_query), ("/jobs/{job_uuid}/logs", _by_path)):
        stream = _stream(logs, named, current_access, capacity, pace)
        streams.get(path, response_class=EventSourceResponse, include_in_schema=False)(stream)
        responses = {**documented(400, 401, 403, 404, 503), 200: _STREAM}
        page = _page(logs, named, current_access)
        pages.get(path, responses=responses, openapi_extra={"parameters": [_RESUMES]})(page)
    streams.include_router(pages)
    return streams


async def _by_query(job_uuid: JobUuidQuery) -> str:
    return job_uuid


async def _by_path(job_uuid: str) -> str:
    return job_uuid


def _page(
    logs: LogService, named: Callable[..., Any], current_access: Callable[..., Any]
) -> Callable[..., Any]:
    def get_training_job_logs(
        offset: Offset = 0,
        limit: Limit = MAX_PAGE_LINES,
        job_uuid: str = Depends(named),
        access: Any = Depends(current_access),
    ) -> PostTrainingJobLogStream:
        """Return the lines of a job's log so far, all attempts, by pages; or follow it."""
        return logs.page(job_uuid, access, offset, limit)

    return get_training_job_logs


def _stream(
    logs: LogService,
    named: Callable[..., Any],
    current_access: Callable[..., Any],
    capacity: Capacity,
    pace: Pace,
) -> Callable[..., Any]:
    async def begin(
        offset: Offset = 0,
        last_event_id: LastEventId = None,
        job_uuid: str = Depends(named),
        access: Any = Depends(current_access),
    ) -> AsyncIterator[Cursor]:
        """Hold a place and find the first line; what is refused is answered here, before the stream."""
        with capacity.followers.one(access.user_name):
            start = last_event_id if last_event_id is not None else offset
            yield await capacity.log_readers.run(logs.seek, job_uuid, access, start)

    async def follow_training_job_logs(
        limit: Limit = MAX_PAGE_LINES,
        cursor: Cursor = Depends(begin),
        job_uuid: str = Depends(named),
        access: Any = Depends(current_access),
    ) -> AsyncIterator[ServerSentEvent]:
        async def look(at: Cursor) -> Step:
            return await capacity.log_readers.run(logs.step, job_uuid, access, at)

        try:
            async for step in follow(look, cursor, pace):
                for event in _events(job_uuid, step, limit):
                    yield event
        except PostTrainingError as error:  # who comes again gets it as an answer
            logger.info("The log of job %s is followed no more: %s", job_uuid, error)

    return follow_training_job_logs


def _events(job_uuid: str, step: Step, limit: int) -> Iterator[ServerSentEvent]:
    """Yield a step as events of at most ``limit`` lines; each one's id is the offset of the next line."""
    # As dicts: FastAPI would write models as UTF-8 and cut lines at U+2028 and U+0085, inside of a string.
    if step.status is not None:
        yield ServerSentEvent(event="status", data=step.status.model_dump(mode="json"))
    first = step.cursor.offset - len(step.lines)
    for begin in range(0, len(step.lines), limit):
        end = min(begin + limit, len(step.lines))
        lines = PostTrainingJobLogStream(job_uuid=job_uuid, log_lines=step.lines[begin:end])
        yield ServerSentEvent(event="log", id=str(first + end), data=lines.model_dump(mode="json"))
