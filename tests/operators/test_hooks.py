"""The hooks: what a connection says, and what it leads to."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from post_training.errors import ForbiddenError
from post_training.operators.hooks import MLflowHook, PostTrainingHook
from tests.operators.conftest import ApiServer, connect


def test_the_connection_test_counts_the_jobs(api: ApiServer) -> None:
    assert PostTrainingHook().test_connection() == (True, "0 jobs")
    api.stop()
    assert PostTrainingHook().test_connection()[0] is False


def test_a_login_is_used_and_a_password_without_a_user_is_a_token(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch, host=api.url, login="admin", password="wrong")
    with pytest.raises(ForbiddenError, match="refuses the login of 'admin'"):
        PostTrainingHook().get_conn().list_jobs()
    connect(monkeypatch, host=api.url, password="token-of-admin")
    assert PostTrainingHook().get_conn().list_jobs().data == []


def test_the_network_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, host="airflow/post-training", password="token")
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"data": []})

    PostTrainingHook(transport=httpx.MockTransport(answer)).get_conn().list_jobs()
    assert asked == ["http://airflow/post-training/v1alpha/post-training/jobs"]


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
