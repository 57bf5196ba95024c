"""The hooks, against a real server and its refusals."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from post_training.errors import (
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    RecordUnavailableError,
)
from post_training.job_ids import TaskKey
from post_training.operators.hooks import MLflowHook, PostTrainingHook
from post_training.schemas.jobs import JobStatus
from tests.fakes import task
from tests.operators.conftest import ApiServer, connect

KEY = TaskKey("supervised_fine_tune", "job-1", "train")


def test_a_job_is_listed_read_and_cancelled(api: ApiServer) -> None:
    api.runs.add(task(KEY, "running"))
    hook = PostTrainingHook()
    assert [job.job_uuid for job in hook.list_jobs().data] == ["job-1"]
    assert hook.job_status("job-1").status is JobStatus.in_progress
    assert hook.job_artifacts("job-1").checkpoints == []
    hook.cancel_job("job-1")
    assert api.runs.tasks["job-1"].state == "failed"
    with pytest.raises(JobConflictError, match="has ended"):
        hook.cancel_job("job-1")


def test_a_jobs_log_is_read_from_a_line_on(api: ApiServer) -> None:
    api.runs.add(task(KEY, "running"))
    api.runs.logs["job-1"] = [["a", "b", "c"]]
    assert PostTrainingHook().job_logs("job-1").log_lines == ["a", "b", "c"]
    assert PostTrainingHook().job_logs("job-1", offset=2).log_lines == ["c"]
    with pytest.raises(InvalidRequestError, match="offset"):
        PostTrainingHook().job_logs("job-1", offset=-1)


def test_refusals_become_the_errors_of_the_tree(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobNotFoundError, match="'nothing'"):
        PostTrainingHook().job_status("nothing")
    connect(monkeypatch, host=api.url, login="admin", password="wrong")
    with pytest.raises(ForbiddenError, match="refuses the login of 'admin'"):
        PostTrainingHook().list_jobs()
    connect(monkeypatch, host=api.url, password="another-token")
    with pytest.raises(ForbiddenError, match="Not authenticated"):
        PostTrainingHook().list_jobs()


def test_a_password_without_a_user_is_a_token(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, host=api.url, password="token-of-admin")
    assert PostTrainingHook().list_jobs().data == []


def test_a_silent_server_is_told_apart(api: ApiServer) -> None:
    api.stop()
    with pytest.raises(RecordUnavailableError, match="does not answer"):
        PostTrainingHook().list_jobs()
    assert PostTrainingHook().test_connection()[0] is False


def answering(**answers: httpx.Response) -> PostTrainingHook:
    """Return a hook whose network answers the login and everything else so."""

    def answer(request: httpx.Request) -> httpx.Response:
        return answers["login" if request.url.path == "/auth/token" else "api"]

    return PostTrainingHook(transport=httpx.MockTransport(answer))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        *((code, ForbiddenError) for code in (400, 401, 403, 422)),
        *((code, RecordUnavailableError) for code in (200, 302, 404, 429, 500, 502, 503)),
    ],
)
def test_only_a_wrong_login_is_a_refusal(api: ApiServer, code: int, error: type[Exception]) -> None:
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
        ({"login": LOGIN, "api": httpx.Response(404, headers=AS_JSON)}, JobNotFoundError),
    ],
)
def test_an_answer_without_json_is_an_error_of_the_tree(
    api: ApiServer, answers: dict[str, httpx.Response], error: type[Exception]
) -> None:
    with pytest.raises(error):
        answering(**answers).job_status("job-1")


def test_an_unavailable_record_is_told_apart(api: ApiServer) -> None:
    api.runs.add(task(KEY, "running"))
    api.tracking.down = True
    with pytest.raises(RecordUnavailableError, match="503"):
        PostTrainingHook().job_status("job-1")


def test_the_connection_test_counts_the_jobs(api: ApiServer) -> None:
    assert PostTrainingHook().test_connection() == (True, "0 jobs")


@pytest.mark.parametrize("runtime", [{"seed": 7}, '{"seed": 7}'])
def test_runtime_defaults_come_from_the_connection(monkeypatch: pytest.MonkeyPatch, runtime: Any) -> None:
    connect(monkeypatch, host="http://airflow/post-training", extra={"runtime": runtime})
    assert PostTrainingHook().runtime_defaults() == {"seed": 7}


@pytest.mark.parametrize(
    ("fields", "uri"),
    [
        ({"host": "http://mlflow:5000/"}, "http://mlflow:5000"),
        ({"host": "mlflow", "port": 5000}, "http://mlflow:5000"),
        ({"host": "https://mlflow.example.org/path"}, "https://mlflow.example.org/path"),
    ],
)
def test_the_tracking_server_of_a_connection(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], uri: str
) -> None:
    connection = {"conn_type": "mlflow", "login": "me", "password": "secret", **fields}
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(connection))
    server = MLflowHook().get_conn().server
    assert server.uri == uri
    assert server.experiment == "post-training"
    assert server.environment() == {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "secret"}
    assert "secret" not in repr(server)
    assert server.run_url("3", "abc") == f"{uri}/#/experiments/3/runs/abc"
