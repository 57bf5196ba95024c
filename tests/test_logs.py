"""A job's log over its attempts, between a fake Airflow and a fake MLflow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from post_training import logs as module
from post_training.errors import ForbiddenError, JobNotFoundError, RecordUnavailableError
from post_training.job_ids import TaskKey
from post_training.jobs import JobService
from post_training.logs import Cursor, LogService
from post_training.record import identity_tags
from post_training.schemas.jobs import JobStatus
from tests.fakes import FakeAccess, FakeRuns, FakeTracking, task
from tests.test_jobs import Accepting

JOB = "job-1"
KEY = TaskKey("supervised_fine_tune", JOB, "train")
ALL = FakeAccess()
TAGS = identity_tags(KEY)


@pytest.fixture
def runs() -> FakeRuns:
    """A job in its third attempt; the second one logged nothing."""
    fake = FakeRuns(logs={JOB: [["a0", "a1", "a2"], [], ["c0", "c1"]]})
    fake.add(replace(task(KEY, "running"), attempt=3))
    return fake


@pytest.fixture
def tracking() -> FakeTracking:
    fake = FakeTracking()
    fake.create_run(name=JOB, experiment=None, tags=TAGS, params={}, request={})
    return fake


@pytest.fixture
def logs(runs: FakeRuns, tracking: FakeTracking) -> LogService:
    jobs = JobService(runs, lambda: tracking, Accepting())  # type: ignore[arg-type, return-value]
    return LogService(runs, jobs)


@pytest.mark.parametrize(
    ("offset", "limit", "lines", "next_offset"),
    [
        (0, 10, ["a0", "a1", "a2", "c0", "c1"], None),
        (0, 5, ["a0", "a1", "a2", "c0", "c1"], None),
        (0, 4, ["a0", "a1", "a2", "c0"], 4),
        (2, 2, ["a2", "c0"], 4),
        (4, 2, ["c1"], None),
        (5, 2, [], None),
        (2**31 - 1, 1, [], None),
    ],
)
def test_a_page_counts_lines_over_all_attempts(
    logs: LogService, offset: int, limit: int, lines: list[str], next_offset: int | None
) -> None:
    page = logs.page(JOB, ALL, offset, limit)
    assert (page.job_uuid, page.log_lines, page.next_offset) == (JOB, lines, next_offset)


def test_the_pages_together_are_the_log_also_where_lines_are_long(
    logs: LogService, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PAGE_CHARACTERS", 10)
    runs.logs[JOB] = [["x" * 5, "y" * 5, "z"], ["w" * 30], ["v"]]
    offset: int | None = 0
    pages = []
    while offset is not None:
        page = logs.page(JOB, ALL, offset, 100)
        pages.append(page.log_lines)
        offset = page.next_offset
    assert pages == [["x" * 5, "y" * 5], ["z"], ["w" * 30], ["v"]]


@pytest.mark.parametrize(
    ("offset", "cursor"),
    [
        (0, Cursor(1, 0, 0)),
        (2, Cursor(1, 2, 2)),
        (3, Cursor(3, 0, 3)),
        (4, Cursor(3, 1, 4)),
        (9, Cursor(3, 6, 9)),
    ],
)
def test_an_offset_is_found_in_its_attempt(logs: LogService, offset: int, cursor: Cursor) -> None:
    assert logs.seek(JOB, ALL, offset) == cursor


def test_before_its_first_attempt_a_job_has_no_log(logs: LogService, runs: FakeRuns) -> None:
    runs.add(replace(task(KEY, None), attempt=0))
    runs.logs.clear()
    assert logs.page(JOB, ALL, 0, 10).log_lines == []
    assert logs.seek(JOB, ALL, 0) == Cursor()
    step = logs.step(JOB, ALL, Cursor())
    assert (step.lines, step.cursor, step.more, step.status) == ([], Cursor(), False, None)


def test_steps_go_through_the_attempts_and_wait_for_the_newest(
    logs: LogService, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PAGE_LINES", 2)
    cursor, seen = Cursor(), []
    for _ in range(6):
        step = logs.step(JOB, ALL, cursor)
        assert step.status is None
        seen.append((step.lines, step.cursor.offset, step.more))
        cursor = step.cursor
    assert seen == [
        (["a0", "a1"], 2, True),
        (["a2"], 3, False),
        ([], 3, True),
        ([], 3, True),
        (["c0", "c1"], 5, False),
        ([], 5, False),
    ]
    runs.logs[JOB][0].append("a late line of the first attempt")
    runs.logs[JOB][2].append("c2")
    assert logs.step(JOB, ALL, cursor).lines == ["c2"]


@pytest.mark.parametrize(
    ("attempt", "state", "counted"),
    [(3, "running", 4), (3, "up_for_retry", 4), (3, "failed", 5), (4, "running", 5)],
)
def test_a_line_counts_when_no_older_one_can_come_before_it(
    logs: LogService, runs: FakeRuns, attempt: int, state: str, counted: int
) -> None:
    """In the newest attempt, while it may still log something."""
    runs.young_lines = 1
    runs.add(replace(task(KEY, state), attempt=attempt))
    assert len(logs.page(JOB, ALL, 0, 10).log_lines) == counted
    assert logs.step(JOB, ALL, Cursor(3, 1, 4)).lines == ["c1"][: counted - 4]


@pytest.mark.parametrize(
    ("state", "mlflow", "status"),
    [
        ("running", "FINISHED", None),
        ("up_for_retry", "RUNNING", None),
        (None, "SCHEDULED", None),
        ("success", "FINISHED", JobStatus.completed),
        ("failed", "FAILED", JobStatus.failed),
        ("failed", "KILLED", JobStatus.cancelled),
    ],
)
def test_only_the_end_has_a_status_and_only_after_the_last_line(
    logs: LogService, runs: FakeRuns, tracking: FakeTracking, state: str, mlflow: str, status: JobStatus
) -> None:
    runs.add(replace(task(KEY, state), attempt=3))
    tracking.set_status("run-1", mlflow)
    assert logs.step(JOB, ALL, Cursor(3, 1, 4)).status is None
    found = logs.step(JOB, ALL, Cursor(3, 2, 5)).status
    assert (found.status if found else None) is status


@pytest.mark.parametrize(("attempt", "lines"), [(0, []), (1, ["new"])])
def test_the_log_of_a_job_that_was_submitted_anew_begins_anew(
    logs: LogService, runs: FakeRuns, attempt: int, lines: list[str]
) -> None:
    runs.add(replace(task(KEY, "running"), attempt=attempt))
    runs.logs[JOB] = [lines]
    step = logs.step(JOB, ALL, Cursor(3, 1, 4))
    assert (step.lines, step.cursor, step.more, step.status) == ([], Cursor(), True, None)
    step = logs.step(JOB, ALL, step.cursor)
    assert (step.lines, step.cursor.attempt, step.more, step.status) == (lines, 1, False, None)


def test_a_step_is_a_page_of_lines_and_of_characters(
    logs: LogService, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.logs[JOB] = [["x" * 10] * 10_001]
    step = logs.step(JOB, ALL, Cursor())
    assert (len(step.lines), step.cursor, step.more) == (10_000, Cursor(1, 10_000, 10_000), True)
    monkeypatch.setattr(module, "MAX_PAGE_CHARACTERS", 35)
    step = logs.step(JOB, ALL, Cursor())
    assert (len(step.lines), step.cursor, step.more) == (3, Cursor(1, 3, 3), True)


def test_mlflow_is_needed_only_to_say_how_a_job_ended(
    logs: LogService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    tracking.down = True
    assert logs.page(JOB, ALL, 0, 10).log_lines[-1] == "c1"
    assert logs.step(JOB, ALL, logs.seek(JOB, ALL, 5)).status is None
    runs.add(replace(task(KEY, "success"), attempt=3))
    with pytest.raises(RecordUnavailableError):
        logs.step(JOB, ALL, Cursor(3, 2, 5))


def test_a_job_that_airflow_has_forgotten_has_no_log_and_its_end_is_known(
    logs: LogService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    runs.tasks.clear()
    tracking.set_status("run-1", "FINISHED")
    assert logs.page(JOB, ALL, 0, 10).log_lines == []
    step = logs.step(JOB, ALL, Cursor(2, 1, 4))
    assert step.status is not None
    assert step.status.status is JobStatus.completed


@pytest.mark.parametrize(
    ("access", "error"),
    [(FakeAccess(read=False), JobNotFoundError), (FakeAccess(logs=False), ForbiddenError)],
)
def test_every_reading_asks_for_the_callers_rights(
    logs: LogService, access: FakeAccess, error: type[Exception]
) -> None:
    with pytest.raises(error):
        logs.page(JOB, access, 0, 10)
    with pytest.raises(error):
        logs.seek(JOB, access, 0)
    with pytest.raises(error):
        logs.step(JOB, access, Cursor())
    with pytest.raises(JobNotFoundError):
        logs.page("nothing", ALL, 0, 10)
