"""A job's log over all of its attempts: page by page, and step by step while it grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Protocol

from post_training.airflow_runs import JobTask
from post_training.errors import ForbiddenError, JobNotFoundError
from post_training.job_ids import TaskKey
from post_training.jobs import Access, JobService
from post_training.reconcile import Evidence
from post_training.schemas.jobs import PostTrainingJobLogStream, PostTrainingJobStatusResponse

MAX_PAGE_LINES = 10_000

MAX_PAGE_CHARACTERS = 4 * 2**20
"""A page is cut before the line that would exceed it; its first line is whole, however long."""


SETTLED_AFTER = timedelta(seconds=2)
"""A line is counted when it is so old: until then an older one may still come before it."""


class Runs(Protocol):
    """The jobs' tasks and their logs in Airflow; ``airflow_runs.AirflowRuns`` says what each method does."""

    def find(self, job_uuid: str) -> JobTask | None:
        """Return the job's task."""

    def log_lines(self, key: TaskKey, attempt: int, until: datetime | None = None) -> Iterator[str]:
        """Yield the lines of an attempt's log."""


@dataclass(frozen=True)
class Cursor:
    """A place in a job's log.

    It names the attempt, so that a line which an earlier attempt writes late moves nothing.

    :param attempt: attempt whose line comes next, counted from 1.
    :param position: lines of that attempt that lie before.
    :param offset: lines of the whole log that lie before.
    """

    attempt: int = 1
    position: int = 0
    offset: int = 0

    def after(self, count: int) -> Cursor:
        """Return the place ``count`` lines further in the same attempt."""
        return Cursor(self.attempt, self.position + count, self.offset + count)

    def in_next_attempt(self) -> Cursor:
        """Return the place of the next attempt's first line."""
        return Cursor(self.attempt + 1, 0, self.offset)


@dataclass(frozen=True)
class Step:
    """What lies at a cursor.

    :param lines: the next lines of one attempt.
    :param cursor: the place after them.
    :param more: whether more is known to lie there.
    :param status: the job's status where it has ended and no line is left.
    """

    lines: list[str]
    cursor: Cursor
    more: bool = False
    status: PostTrainingJobStatusResponse | None = None


class LogService:
    """Reads jobs' logs. MLflow is asked only for what Airflow does not know: how a job has ended.

    :param runs: the jobs' tasks in Airflow.
    :param jobs: finds jobs that Airflow has forgotten, and says how jobs ended.
    """

    def __init__(self, runs: Runs, jobs: JobService) -> None:
        self._runs = runs
        self._jobs = jobs

    def page(self, job_uuid: str, access: Access, offset: int, limit: int) -> PostTrainingJobLogStream:
        """Return at most ``limit`` lines of a job's log from line ``offset`` on, counted over all attempts.

        :raises JobNotFoundError: if there is no such job, or the caller may not see it.
        :raises ForbiddenError: if the caller may see the job but no logs.
        :raises RecordUnavailableError: if Airflow's database does not answer.
        """
        task = self._task(job_uuid, access)
        lines = self._all_lines(task) if task is not None else iter(())
        taken, more = _take(islice(lines, offset, None), limit)
        return PostTrainingJobLogStream(
            job_uuid=job_uuid, log_lines=taken, next_offset=offset + len(taken) if more else None
        )

    def seek(self, job_uuid: str, access: Access, offset: int) -> Cursor:
        """Return the place of line ``offset``; beyond the last line, in the newest attempt.

        :raises JobNotFoundError: as ``page``.
        :raises ForbiddenError: as ``page``.
        :raises RecordUnavailableError: as ``page``.
        """
        task = self._task(job_uuid, access)
        attempt, before = 1, 0
        while task is not None and attempt < task.attempt:
            count = sum(1 for _ in self._lines(task, attempt))
            if offset < before + count:
                break
            attempt, before = attempt + 1, before + count
        return Cursor(attempt, offset - before, offset)

    def step(self, job_uuid: str, access: Access, cursor: Cursor) -> Step:
        """Return what lies at the cursor now, at most a page. The caller's rights are asked again each time.

        :raises JobNotFoundError: as ``page``.
        :raises ForbiddenError: as ``page``.
        :raises RecordUnavailableError: if Airflow's database, or MLflow at the end, does not answer.
        """
        task = self._task(job_uuid, access)  # before its lines: an attempt that is over writes no more
        if task is not None:
            if cursor.attempt > max(1, task.attempt):  # the DAG run was deleted and submitted again
                return Step([], Cursor(), more=True)
            lines = islice(self._lines(task, cursor.attempt), cursor.position, None)
            taken, more = _take(lines, MAX_PAGE_LINES)
            if taken:
                return Step(taken, cursor.after(len(taken)), more)
            if cursor.attempt < task.attempt:
                return Step([], cursor.in_next_attempt(), more=True)
        if task is not None and Evidence(None, task.state).task_lives:
            return Step([], cursor)
        status = self._jobs.status(job_uuid, access)
        return Step([], cursor, status=status if status.status.ended else None)

    def _all_lines(self, task: JobTask) -> Iterator[str]:
        for attempt in range(1, task.attempt + 1):
            yield from self._lines(task, attempt)

    def _lines(self, task: JobTask, attempt: int) -> Iterator[str]:
        """Yield an attempt's lines whose places are settled."""
        grows = attempt == task.attempt and Evidence(None, task.state).task_lives
        until = datetime.now(UTC) - SETTLED_AFTER if grows else None
        return self._runs.log_lines(task.key, attempt, until)

    def _task(self, job_uuid: str, access: Access) -> JobTask | None:
        """Find the task whose log the caller may read; None where only MLflow remembers the job."""
        task = self._runs.find(job_uuid)
        if task is None:
            self._jobs.locate(job_uuid, access)
            return None
        if not access.may_read(task.key.dag_id):
            raise JobNotFoundError(job_uuid)
        if not access.may_read_logs(task.key.dag_id):
            raise ForbiddenError(f"{access.user_name} may not read logs of the DAG {task.key.dag_id!r}")
        return task


def _take(lines: Iterator[str], limit: int) -> tuple[list[str], bool]:
    """Return the lines that fit a page, and whether there are more."""
    taken: list[str] = []
    size = 0
    for line in lines:
        size += len(line)
        if taken and (len(taken) == limit or size > MAX_PAGE_CHARACTERS):
            return taken, True
        taken.append(line)
    return taken, False
