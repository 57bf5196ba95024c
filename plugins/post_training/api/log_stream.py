"""Follows a job's log from attempt to attempt until the job has ended and its log is whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import anyio

from post_training.errors import BusyError, RecordUnavailableError
from post_training.logs import Cursor, Step
from post_training.schemas.jobs import JobStatus, PostTrainingJobStatusResponse


@dataclass(frozen=True)
class Pace:
    """How often a follower looks. All times in seconds.

    :param poll: pause after a look that found nothing new.
    :param rest: the pause in units of the time that the look took, where that is longer: Airflow reads an
        attempt's log as a whole, and long ones shall not take the server's time.
    :param longest: longest pause, of that and after failures.
    :param life: after how long a stream ends, whatever the job does; its client comes again and goes on.
    :param linger: how long after its end a job may still write: Airflow tells a task's process within two
        heartbeats that it is cancelled, and the process then has some seconds to stop.
    """

    poll: float = 1.0
    rest: float = 10.0
    longest: float = 60.0
    life: float = 3600.0
    linger: Mapping[JobStatus, float] = field(
        default_factory=lambda: {JobStatus.completed: 2.0, JobStatus.failed: 2.0, JobStatus.cancelled: 15.0}
    )

    def pause(self, look_seconds: float, failures: int) -> float:
        """Return the seconds until the next look."""
        return min(self.longest, max(self.poll, self.rest * look_seconds) * 2.0 ** min(failures, 16))

    def pause_before_more(self, look_seconds: float) -> float:
        """Return the seconds until the next look where more is known to lie there; quick looks need none."""
        return self.pause(look_seconds, 0) if look_seconds > self.poll else 0.0

    def left_to_linger(self, status: PostTrainingJobStatusResponse, now: datetime) -> float:
        """Return for how many seconds an ended job may still write; bounded where clocks disagree."""
        linger = self.linger[status.status]
        since = (now - status.completed_at).total_seconds() if status.completed_at is not None else 0.0
        return min(linger, max(0.0, linger - since))


async def follow(
    look: Callable[[Cursor], Awaitable[Step]], cursor: Cursor, pace: Pace
) -> AsyncIterator[Step]:
    """Yield the steps that have lines, as they come; the last one has the ended job's status instead.

    An outage is waited out. After ``pace.life`` there is no such last one.

    :param look: returns what lies at a cursor.
    :raises PostTrainingError: if the job is gone, or the caller has lost the right to its log.
    """
    whole_at: float | None = None
    failures = 0
    ends_at = anyio.current_time() + pace.life
    while (began := anyio.current_time()) < ends_at:
        try:
            step = await look(cursor)
        except (RecordUnavailableError, BusyError):
            await anyio.sleep(pace.pause(0.0, failures))
            failures += 1
            continue
        failures, cursor, look_seconds = 0, step.cursor, anyio.current_time() - began
        if step.lines:
            yield step
        if step.more:
            await anyio.sleep(pace.pause_before_more(look_seconds))
        elif step.status is None:
            whole_at = None
            await anyio.sleep(pace.pause(look_seconds, failures))
        elif whole_at is None:
            whole_at = anyio.current_time() + pace.left_to_linger(step.status, datetime.now(UTC))
        elif began >= whole_at:
            yield step
            return
        else:
            await anyio.sleep(max(0.0, min(pace.poll, whole_at - anyio.current_time())))
