"""The pace of a follower, and what it makes of what it finds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime, timedelta
from time import monotonic

import pytest

from post_training.api.log_stream import Pace, follow
from post_training.errors import BusyError, JobNotFoundError, RecordUnavailableError
from post_training.logs import Cursor, Step
from post_training.schemas.jobs import JobStatus, PostTrainingJobStatusResponse
from tests.fakes import NOW

LINGER = {JobStatus.completed: 0.2, JobStatus.failed: 0.0, JobStatus.cancelled: 15.0}


def ended(
    status: JobStatus = JobStatus.completed, at: datetime | None = None
) -> PostTrainingJobStatusResponse:
    return PostTrainingJobStatusResponse(job_uuid="job-1", status=status, completed_at=at)


def followed(script: Iterable[Step | Exception], pace: Pace) -> tuple[list[Step], list[int]]:
    """Follow a script, whose last entry repeats; return what was yielded, and the offsets looked at."""
    rest, seen, found = list(script), [], []

    async def look(cursor: Cursor) -> Step:
        seen.append(cursor.offset)
        entry = rest.pop(0) if len(rest) > 1 else rest[0]
        if isinstance(entry, Exception):
            raise entry
        return entry

    async def collect() -> None:
        async for step in follow(look, Cursor(), pace):
            found.append(step)

    asyncio.run(collect())
    return found, seen


def test_a_line_of_a_job_that_has_ended_comes_before_the_status() -> None:
    end = Step([], Cursor(1, 0, 0), status=ended())
    last = Step(["stopping"], Cursor(1, 1, 1))
    over = Step([], Cursor(1, 1, 1), status=ended())
    found, _ = followed([end, end, last, over], Pace(poll=0.01, linger=LINGER))
    assert found[0] is last
    assert found[1] is over
    assert len(found) == 2


def test_the_status_comes_when_the_job_has_lingered_and_at_once_where_it_ended_long_ago() -> None:
    began = monotonic()
    followed([Step([], Cursor(), status=ended())], Pace(poll=0.01, linger=LINGER))
    assert monotonic() - began >= 0.2
    began = monotonic()
    followed([Step([], Cursor(), status=ended(at=NOW))], Pace(poll=60, linger={JobStatus.completed: 60}))
    assert monotonic() - began < 30


def test_a_job_that_is_cleared_while_it_lingers_is_followed_on() -> None:
    end, waits = Step([], Cursor(), status=ended(JobStatus.failed)), Step([], Cursor())
    again = Step(["second try"], Cursor(2, 1, 1))
    done = Step([], Cursor(2, 1, 1), status=ended(JobStatus.failed))
    found, _ = followed([end, waits, again, done], Pace(poll=0.01, linger=LINGER))
    assert found == [again, done]


def test_outages_are_waited_out_longer_and_longer() -> None:
    down = [RecordUnavailableError("down"), BusyError("full"), RecordUnavailableError("down")]
    done = Step([], Cursor(1, 1, 1), status=ended(JobStatus.failed))
    began = monotonic()
    found, seen = followed(
        [Step(["a"], Cursor(1, 1, 1), more=True), *down, done], Pace(poll=0.05, linger=LINGER)
    )
    assert [step.lines for step in found] == [["a"], []]
    assert seen[1:] == [1, 1, 1, 1, 1]
    assert monotonic() - began >= 0.05 * (1 + 2 + 4)


def test_other_errors_end_the_following() -> None:
    with pytest.raises(JobNotFoundError):
        followed([JobNotFoundError("job-1")], Pace())


def test_between_full_pages_that_are_found_quickly_there_is_no_pause_and_after_others_there_is() -> None:
    pages = [Step(["x"], Cursor(1, n, n), more=True) for n in range(1, 50)]
    done = Step([], Cursor(1, 49, 49), status=ended(JobStatus.failed))
    began = monotonic()
    followed([*pages, done], Pace(poll=60, linger=LINGER))
    assert monotonic() - began < 30
    began = monotonic()
    followed([Step(["x"], Cursor(1, 49, 49)), done], Pace(poll=0.5, linger=LINGER))
    assert monotonic() - began >= 0.5


def test_after_a_slow_look_there_is_a_pause_before_more_too() -> None:
    script = [Step(["x"], Cursor(1, 1, 1), more=True), Step([], Cursor(1, 1, 1), status=ended(at=NOW))]

    async def collect(look_seconds: float, client_seconds: float, pace: Pace) -> float:
        looked: list[float] = []

        async def look(_: Cursor) -> Step:
            looked.append(monotonic())
            await asyncio.sleep(look_seconds)
            return script[min(len(looked), 2) - 1]

        async for _ in follow(look, Cursor(), pace):
            await asyncio.sleep(client_seconds)
        return looked[1] - looked[0] - client_seconds - look_seconds

    assert asyncio.run(collect(0.1, 0.0, Pace(poll=0.05, rest=4, linger=LINGER))) >= 4 * 0.1
    # a client that takes its time makes no look slow: that would be a pause of 60 s
    assert asyncio.run(collect(0.0, 1.0, Pace(poll=0.5, rest=60, linger=LINGER))) < 30
    assert [Pace().pause_before_more(seconds) for seconds in (1.0, 1.5, 30.0)] == [0.0, 15.0, 60.0]


def test_a_stream_has_an_end_also_where_its_job_has_none() -> None:
    began = monotonic()
    endless = [Step(["x"], Cursor(1, 1, 1)), Step([], Cursor(1, 1, 1))]
    found, seen = followed(endless, Pace(poll=0.01, rest=0, life=0.3))
    assert monotonic() - began >= 0.3
    assert [step.lines for step in found] == [["x"]]
    assert len(seen) > 2
    assert Pace().life == 3600


@pytest.mark.parametrize(
    ("look_seconds", "failures", "seconds"),
    [
        (0.01, 0, 1.0),
        (0.5, 0, 5.0),
        (7.0, 0, 60.0),
        (0.0, 1, 2.0),
        (0.0, 5, 32.0),
        (0.0, 6, 60.0),
        (0, 10**6, 60),
    ],
)
def test_a_pause_grows_with_the_look_and_with_failures(
    look_seconds: float, failures: int, seconds: float
) -> None:
    assert Pace().pause(look_seconds, failures) == seconds


@pytest.mark.parametrize(
    ("status", "seconds_ago", "left"),
    [
        (JobStatus.completed, 0.0, 2.0),
        (JobStatus.completed, 1.5, 0.5),
        (JobStatus.cancelled, 5.0, 10.0),
        (JobStatus.failed, 3600.0, 0.0),
        (JobStatus.failed, -3600.0, 2.0),
    ],
)
def test_an_ended_job_may_still_write_for_a_while(status: JobStatus, seconds_ago: float, left: float) -> None:
    assert Pace().left_to_linger(ended(status, NOW - timedelta(seconds=seconds_ago)), NOW) == left
    assert Pace().left_to_linger(ended(status), NOW) == Pace().linger[status]
