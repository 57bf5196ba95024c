"""The commands that start, read and stop jobs of a deployment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from post_training.cli.exits import ExitCode
from post_training.cli.output import (
    console,
    plain,
    print_checkpoints,
    print_fields,
    print_json,
    print_json_line,
    print_table,
    rounded,
    when,
)
from post_training.cli.request_file import method_of, read_body
from post_training.client import PostTrainingClient
from post_training.errors import JobNotFoundError
from post_training.job_ids import new_job_uuid
from post_training.schemas.jobs import (
    JobStatus,
    PostTrainingJobLogStream,
    PostTrainingJobStatusResponse,
)


def submit(api: PostTrainingClient, file: Path, *, job_uuid: str | None, as_json: bool) -> None:
    """Start the job that a file describes, and print its id.

    :raises PostTrainingError: if it is refused.
    """
    body = read_body(file, job_uuid=job_uuid, default_job_uuid=new_job_uuid(file.stem, datetime.now()))
    job = api.submit(method_of(body), body)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        print(job.job_uuid)


def list_jobs(api: PostTrainingClient, *, limit: int, with_status: bool, as_json: bool) -> None:
    """Print the newest jobs.

    :param limit: how many; 0 is all.
    :param with_status: whether each one's status is asked for.
    :raises PostTrainingError: if the API does not answer.
    """
    every = [job.job_uuid for job in api.list_jobs().data]
    ids = every[: limit or None]
    if len(ids) < len(every):
        note = f"the newest {len(ids)} of {len(every)} jobs; --limit 0 lists all"
        console(stderr=True).print(plain(note))
    if with_status:
        _print_statuses(list(_statuses(api, ids)), as_json=as_json)
    elif as_json:
        print_json({"data": [{"job_uuid": job_uuid} for job_uuid in ids]})
    else:
        for job_uuid in ids:
            print(job_uuid)


def _statuses(api: PostTrainingClient, ids: list[str]) -> Iterator[PostTrainingJobStatusResponse]:
    """Yield each job's status, but for jobs that were deleted since they were listed."""
    for job_uuid in ids:
        with suppress(JobNotFoundError):
            yield api.job_status(job_uuid)


def _print_statuses(statuses: list[PostTrainingJobStatusResponse], *, as_json: bool) -> None:
    if as_json:
        print_json({"data": [status.model_dump(mode="json") for status in statuses]})
        return
    rows = (
        (each.job_uuid, each.status.value, when(each.scheduled_at), when(each.completed_at), each.error)
        for each in statuses
    )
    print_table(("job", "status", "scheduled", "ended", "error"), rows)


def status(api: PostTrainingClient, job_uuid: str, *, as_json: bool) -> None:
    """Print a job's status.

    :raises JobNotFoundError: if there is no such job.
    """
    found = api.job_status(job_uuid)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    times = {
        "scheduled": when(found.scheduled_at),
        "started": when(found.started_at),
        "ended": when(found.completed_at),
    }
    print_fields(
        {"job": found.job_uuid, "status": found.status.value, **times, "error": found.error}
        | _shown_resources(found.resources_allocated or {})
    )
    if found.checkpoints:
        print_checkpoints(found.checkpoints)


def _shown_resources(resources: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("_", " "): rounded(value) if isinstance(value, float) else value
        for name, value in resources.items()
    }


def artifacts(api: PostTrainingClient, job_uuid: str, *, as_json: bool) -> None:
    """Print a job's checkpoints, oldest first.

    :raises JobNotFoundError: if there is no such job.
    """
    found = api.job_artifacts(job_uuid)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_checkpoints(found.checkpoints)


def cancel(api: PostTrainingClient, job_uuid: str, *, as_json: bool) -> None:
    """Stop a job.

    :raises JobNotFoundError: if there is no such job.
    :raises JobConflictError: if it has ended.
    """
    api.cancel_job(job_uuid)
    if as_json:
        print_json({"job_uuid": job_uuid, "status": JobStatus.cancelled.value})
    else:
        print(f"{job_uuid} is cancelled; its checkpoints so far are kept.")


def logs(api: PostTrainingClient, job_uuid: str, *, offset: int, as_json: bool) -> None:
    """Print a job's log so far, of all its attempts.

    :param offset: lines to leave out at the beginning.
    :raises JobNotFoundError: if there is no such job.
    """
    lines: list[str] = []
    at: int | None = offset
    while at is not None:
        page = api.job_logs(job_uuid, at)
        at = page.next_offset
        if as_json:
            lines += page.log_lines
        else:
            _print_lines(page)
    if as_json:
        print_json({"job_uuid": job_uuid, "log_lines": lines})


def follow_logs(api: PostTrainingClient, job_uuid: str, *, offset: int, as_json: bool) -> ExitCode:
    """Print a job's log as it grows, until the job has ended; return how the job did.

    As JSON it is a line for each part of the log, and last the job's status.

    :raises JobNotFoundError: if there is no such job.
    :raises RecordUnavailableError: if the API does not answer, or no more.
    """
    code = ExitCode.FAILED
    for part in api.follow_logs(job_uuid, offset):
        if as_json:
            print_json_line(part.model_dump(mode="json"))
        elif isinstance(part, PostTrainingJobLogStream):
            _print_lines(part)
        else:
            reason = f": {part.error}" if part.error else ""
            print(f"{job_uuid} is {part.status.value}{reason}")
        if isinstance(part, PostTrainingJobStatusResponse) and part.status is JobStatus.completed:
            code = ExitCode.OK
    return code


def _print_lines(page: PostTrainingJobLogStream) -> None:
    for line in page.log_lines:
        print(line, flush=True)
