"""The HTTP client, against the real API on a real port and against its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from post_training.client import Patience, PostTrainingClient
from post_training.errors import (
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    PostTrainingError,
    RecordUnavailableError,
    RequestTooLargeError,
)
from post_training.job_ids import TaskKey
from post_training.schemas.jobs import JobStatus, PostTrainingJobLogStream, PostTrainingJobStatusResponse
from tests.fakes import task
from tests.operators.conftest import ApiServer
from tests.requests_of import sft_body

KEY = TaskKey("supervised_fine_tune", "job-1", "train")
URL = "http://airflow/post-training"


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(api: ApiServer) -> PostTrainingClient:
    return PostTrainingClient(api.url, user="admin", secret="right")


def test_a_job_is_submitted_listed_read_and_cancelled(api: ApiServer, client: PostTrainingClient) -> None:
    assert client.submit("supervised_fine_tune", sft_body()).job_uuid == "job-1"
    api.runs.add(task(KEY, "running", api.runs.tasks["job-1"].conf))
    assert [job.job_uuid for job in client.list_jobs().data] == ["job-1"]
    assert client.job_status("job-1").status is JobStatus.in_progress
    assert client.job_artifacts("job-1").checkpoints == []
    client.cancel_job("job-1")
    assert api.runs.tasks["job-1"].state == "failed"
    with pytest.raises(JobConflictError, match="has ended"):
        client.cancel_job("job-1")
    with pytest.raises(JobConflictError, match="another request"):
        client.submit("supervised_fine_tune", sft_body(training_config__n_epochs=2))


def test_what_is_wrong_with_a_request_is_told_field_by_field(client: PostTrainingClient) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.submit("supervised_fine_tune", sft_body(training_config__n_epochs=0, colour="red"))
    assert [error["loc"] for error in caught.value.errors] == [["training_config", "n_epochs"], ["colour"]]
    with pytest.raises(RequestTooLargeError, match="10000 bytes"):
        client.submit("supervised_fine_tune", sft_body(model="m" * 20_000))


def test_a_jobs_log_is_read_from_a_line_on(api: ApiServer, client: PostTrainingClient) -> None:
    api.runs.add(task(KEY, "running"))
    api.runs.logs["job-1"] = [["a", "b", "c"]]
    assert client.job_logs("job-1").log_lines == ["a", "b", "c"]
    assert client.job_logs("job-1", offset=2).log_lines == ["c"]
    with pytest.raises(InvalidRequestError, match="offset"):
        client.job_logs("job-1", offset=-1)


def test_refusals_become_the_errors_of_the_tree(api: ApiServer, client: PostTrainingClient) -> None:
    with pytest.raises(JobNotFoundError, match="'nothing'"):
        client.job_status("nothing")
    with pytest.raises(ForbiddenError, match="refuses the login of 'admin'"):
        PostTrainingClient(api.url, user="admin", secret="wrong").list_jobs()
    with pytest.raises(ForbiddenError, match="Not authenticated"):
        PostTrainingClient(api.url, secret="another-token").list_jobs()
    with pytest.raises(ForbiddenError, match="Not authenticated"):
        PostTrainingClient(api.url).list_jobs()
    with pytest.raises(RecordUnavailableError, match="404"):
        PostTrainingClient(f"{api.url}/elsewhere", secret="token-of-admin").list_jobs()


def test_a_secret_without_a_user_is_a_token(api: ApiServer) -> None:
    assert PostTrainingClient(api.url, secret="token-of-admin").list_jobs().data == []


def test_a_silent_server_is_told_apart(api: ApiServer, client: PostTrainingClient) -> None:
    api.stop()
    for call in (client.list_jobs, lambda: list(client.follow_logs("job-1"))):
        with pytest.raises(RecordUnavailableError, match="does not answer"):
            call()


def test_an_unavailable_record_is_told_apart(api: ApiServer, client: PostTrainingClient) -> None:
    api.runs.add(task(KEY, "running"))
    api.tracking.down = True
    with pytest.raises(RecordUnavailableError, match="503"):
        client.job_status("job-1")


def client_of(answer: Callable[[httpx.Request], httpx.Response], **patience: float) -> PostTrainingClient:
    """Return a client with a network of its own, which logs in as admin."""
    transport = httpx.MockTransport(answer)
    return PostTrainingClient(
        URL, user="admin", secret="right", transport=transport, patience=Patience(**patience)
    )


def answering(**answers: httpx.Response) -> PostTrainingClient:
    """Return a client whose network answers the login and everything else so."""
    return client_of(lambda request: answers["login" if request.url.path == "/auth/token" else "api"])


@pytest.mark.parametrize(
    ("code", "error"),
    [
        *((code, ForbiddenError) for code in (400, 401, 403, 422)),
        *((code, RecordUnavailableError) for code in (200, 302, 404, 429, 500, 502, 503)),
    ],
)
def test_only_a_wrong_login_is_a_refusal(code: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=str(code)):
        answering(login=httpx.Response(code, text="<html>")).list_jobs()


LOGIN = httpx.Response(201, json={"access_token": "token"})
AS_JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"login": httpx.Response(201, text="<html>")}, RecordUnavailableError),
        ({"login": LOGIN, "api": httpx.Response(200, text="<html>")}, RecordUnavailableError),
        ({"login": LOGIN, "api": httpx.Response(502, headers=AS_JSON)}, RecordUnavailableError),
        ({"login": LOGIN, "api": httpx.Response(502, text="<html>")}, RecordUnavailableError),
        ({"login": LOGIN, "api": httpx.Response(403, content=b"\xff", headers=AS_JSON)}, ForbiddenError),
        ({"login": LOGIN, "api": httpx.Response(404, headers=AS_JSON)}, RecordUnavailableError),
    ],
)
def test_an_answer_without_json_is_an_error_of_the_tree(
    answers: dict[str, httpx.Response], error: type[PostTrainingError]
) -> None:
    with pytest.raises(error):
        answering(**answers).job_status("job-1")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(404, text="<html>"),
        httpx.Response(404, json={"detail": "Not Found"}),
        httpx.Response(404, json={"detail": "no post-training job 'another'"}),
    ],
)
def test_only_our_api_knows_that_there_is_no_such_job(answer: httpx.Response) -> None:
    with pytest.raises(RecordUnavailableError) as told:
        answering(login=LOGIN, api=answer).job_status("job-1")
    assert str(told.value).startswith(f"{URL}/v1alpha/post-training/job/status answers 404: ")


def test_it_logs_in_once_and_anew_when_the_token_is_too_old() -> None:
    tokens, calls = iter(("old", "new")), []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.headers.get("authorization", "login"))
        if request.url.path == "/auth/token":
            assert json.loads(request.content) == {"username": "admin", "password": "right"}
            return httpx.Response(201, json={"access_token": next(tokens)})
        too_old = calls[-1] == "Bearer old" and calls.count("Bearer old") == 3
        return (
            httpx.Response(401, json={"detail": "expired"})
            if too_old
            else httpx.Response(200, json={"data": []})
        )

    client = client_of(answer)
    for _ in range(3):
        assert client.list_jobs().data == []
    assert calls == ["login", "Bearer old", "Bearer old", "Bearer old", "login", "Bearer new"]


def test_a_log_is_followed_to_the_jobs_end(api: ApiServer, client: PostTrainingClient) -> None:
    api.runs.add(task(KEY, "success"))
    api.runs.logs["job-1"] = [["a", "b", "c\u2028d"]]
    lines, end = client.follow_logs("job-1", offset=1)
    assert isinstance(lines, PostTrainingJobLogStream)
    assert lines.log_lines == ["b", "c\u2028d"]
    assert isinstance(end, PostTrainingJobStatusResponse)
    assert end.status is JobStatus.completed
    with pytest.raises(JobNotFoundError):
        list(client.follow_logs("nothing"))


def log(line: str, after: int) -> str:
    data = json.dumps({"job_uuid": "job-1", "log_lines": [line]})
    return f"event: log\nid: {after}\ndata: {data}\n\n"


END = 'event: status\ndata: {"job_uuid": "job-1", "status": "failed"}\n\n'


def following(*streams: Any, outage: float = 60.0) -> tuple[Iterator[Any], list[str]]:
    """Return what follows streams that are served one after the other, and the offsets that were asked for.

    A stream is an answer, or an error of the network.
    """
    waiting, offsets = iter(streams), []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/auth/token":
            return LOGIN
        offsets.append(request.url.params["offset"])
        stream = next(waiting)
        if isinstance(stream, Exception):
            raise stream
        return stream if isinstance(stream, httpx.Response) else httpx.Response(200, text=stream)

    return client_of(answer, pause=0.0, outage=outage).follow_logs("job-1"), offsets


def test_a_stream_that_is_cut_goes_on_where_it_was() -> None:
    cut = log("a", 1) + ": ping\n\n" + log("b", 2) + log("lost", 3).rstrip()
    found, offsets = following(cut, httpx.ConnectError("refused"), httpx.Response(503), log("c", 3) + END)
    *pages, end = found
    assert [page.log_lines for page in pages] == [["a"], ["b"], ["c"]]
    assert end.status is JobStatus.failed
    assert offsets == ["0", "2", "2", "2"]


def test_an_outage_that_does_not_end_is_given_up() -> None:
    found, _ = following(
        log("a", 1), httpx.ConnectError("refused"), httpx.ConnectError("refused"), outage=0.0
    )
    assert next(found).log_lines == ["a"]
    with pytest.raises(RecordUnavailableError, match="refused"):
        next(found)


def test_a_right_that_is_withdrawn_ends_it() -> None:
    found, _ = following(log("a", 1), httpx.Response(403, json={"detail": "may not read logs"}))
    assert next(found).log_lines == ["a"]
    with pytest.raises(ForbiddenError, match="may not read logs"):
        next(found)
