"""The routes of data sets: their answers, their refusals, and what they do for whom."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from llama_stack_client import LlamaStackClient

from tests.api.conftest import LIMIT, Deployment

PREFIXES = ("/v1/datasets", "/v1beta/datasets")
ROWS = [{"question": "2+2?", "answer": "4"}]
BODY: dict[str, Any] = {
    "purpose": "post-training/messages",
    "dataset_id": "math",
    "source": {"type": "rows", "rows": ROWS},
    "metadata": {"by": "hand"},
}


def every_route(dataset_id: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return method, path and arguments of each route."""
    return [
        route
        for prefix in PREFIXES
        for route in (
            ("POST", prefix, {"json": BODY}),
            ("GET", prefix, {}),
            ("GET", f"{prefix}/{dataset_id}", {}),
            ("DELETE", f"{prefix}/{dataset_id}", {}),
        )
    ]


CHANGES = [route for route in every_route("math") if route[0] != "GET"]
READS = [route for route in every_route("math") if route[0] == "GET"]
OF_ONE = [route for route in every_route("nobody") if "nobody" in route[1]]


def test_the_list_above_is_every_route(deployment: Deployment) -> None:
    described = {
        (method.upper(), path)
        for path, item in deployment.app.openapi()["paths"].items()
        for method in item
        if "/datasets" in path
    }
    assert {(method, path) for method, path, _ in every_route("{dataset_id}")} == described


@pytest.mark.parametrize(("method", "path", "arguments"), every_route("math"))
def test_nobody_enters_without_a_token(
    deployment: Deployment, method: str, path: str, arguments: dict[str, Any]
) -> None:
    answer = deployment.client("nobody").request(method, path, **arguments)
    assert (answer.status_code, answer.json()) == (401, {"detail": "Not authenticated"})
    assert deployment.records.versions == []


@pytest.mark.parametrize(("method", "path", "arguments"), CHANGES)
def test_a_viewer_may_change_nothing(
    deployment: Deployment, client: TestClient, method: str, path: str, arguments: dict[str, Any]
) -> None:
    client.post(PREFIXES[0], json=BODY | {"purpose": "eval/question-answer"})
    answer = deployment.client("viewer").request(method, path, **arguments)
    assert (answer.status_code, answer.json()) == (403, {"detail": "viewer may change no data sets"})
    assert len(deployment.records.versions) == 1


@pytest.mark.parametrize(("method", "path", "arguments"), READS)
def test_who_may_see_no_jobs_sees_no_data_sets(
    deployment: Deployment, client: TestClient, method: str, path: str, arguments: dict[str, Any]
) -> None:
    client.post(PREFIXES[0], json=BODY)
    assert deployment.client("viewer").request(method, path, **arguments).status_code == 200
    answer = deployment.client("stranger").request(method, path, **arguments)
    assert (answer.status_code, answer.json()) == (403, {"detail": "stranger may see no data sets"})


@pytest.mark.parametrize(("method", "path", "arguments"), OF_ONE)
def test_what_is_not_registered_is_404(
    client: TestClient, method: str, path: str, arguments: dict[str, Any]
) -> None:
    answer = client.request(method, path, **arguments)
    assert (answer.status_code, answer.json()) == (404, {"detail": "no data set 'nobody'"})


@pytest.mark.parametrize(("method", "path", "arguments"), every_route("math"))
def test_without_the_record_the_client_is_told_when_to_come_again(
    deployment: Deployment, client: TestClient, method: str, path: str, arguments: dict[str, Any]
) -> None:
    deployment.records.down = True
    answer = client.request(method, path, **arguments)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_data_sets_way_through_the_api(client: TestClient, prefix: str) -> None:
    registered = client.post(prefix, json=BODY)
    assert registered.status_code == 200
    dataset = registered.json()
    assert dataset["source"] == {"type": "rows", "uri": "runs:/run-1/rows.jsonl", "rows": ROWS}
    assert dataset.keys() >= {"version", "created_at"}
    assert {key: dataset[key] for key in ("identifier", "purpose", "metadata", "type")} == {
        "identifier": "math",
        "purpose": "post-training/messages",
        "metadata": {"by": "hand"},
        "type": "dataset",
    }
    assert client.get(f"{prefix}/math").json() == dataset
    assert client.get(f"{prefix}/math@{dataset['version'][:8]}").json() == dataset
    listed = {**dataset, "source": {**dataset["source"], "rows": None}}
    assert client.get(prefix).json() == {"data": [listed]}
    deleted = client.delete(f"{prefix}/math", headers={"Accept": "*/*"})
    assert (deleted.status_code, deleted.json()) == (200, None)
    assert client.get(prefix).json() == {"data": []}


def test_both_families_speak_of_the_same_data_sets(client: TestClient) -> None:
    client.post(PREFIXES[0], json=BODY)
    assert client.get(f"{PREFIXES[1]}/math").json() == client.get(f"{PREFIXES[0]}/math").json()


def answer_of(client: TestClient, request: httpx.Request) -> httpx.Response:
    """Return the app's answer to what the published client sends."""
    answer = client.request(
        request.method, request.url.path, content=request.read(), headers=dict(request.headers)
    )
    return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


def test_the_published_client_reads_every_answer(deployment: Deployment) -> None:
    http = httpx.Client(transport=httpx.MockTransport(partial(answer_of, deployment.client())))
    client = LlamaStackClient(base_url="http://testserver", api_key="admin", http_client=http)
    rows = {"type": "rows", "rows": ROWS}
    registered = client.datasets.register(
        dataset_id="math", purpose="post-training/messages", source=rows, metadata={"by": "hand"}
    )
    assert (registered.identifier, registered.source.rows) == ("math", ROWS)
    assert client.datasets.retrieve("math").to_dict() == registered.to_dict()
    # As its command-line tool sends it, without a type.
    file = client.datasets.register(
        purpose="post-training/messages", source={"uri": "data:None;base64,e30K"}, metadata=None
    )
    assert (file.source.type, file.source.uri) == ("uri", "runs:/run-2/rows.jsonl")
    listed = client.datasets.list()
    assert [(entry.identifier, entry.source.type, entry.source.uri) for entry in listed] == [
        (file.identifier, "uri", "runs:/run-2/rows.jsonl"),
        ("math", "rows", "runs:/run-1/rows.jsonl"),
    ]
    client.datasets.unregister("math")
    assert [entry.identifier for entry in client.datasets.list()] == [file.identifier]


@pytest.mark.parametrize(
    ("content", "loc", "kind"),
    [
        ('{"purpose": "post-training/messages"}', ["source"], "missing"),
        (json.dumps(BODY | {"dataset_id": "a/b"}), ["dataset_id"], "dataset_id"),
        (json.dumps(BODY | {"source": {"rows": [1]}}), ["source", "rows", 0], "dict_type"),
        (json.dumps(BODY | {"source": {"uri": "train.jsonl"}}), ["source", "uri"], "value_error"),
        (json.dumps(BODY).replace('"4"', "1e999"), ["source", "rows"], "json_value"),
    ],
)
def test_a_broken_body_is_400_with_the_fields_path(
    deployment: Deployment, client: TestClient, content: str, loc: list[str], kind: str
) -> None:
    answer = client.post(PREFIXES[0], content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert [(error["loc"], error["type"]) for error in answer.json()["detail"]["errors"]] == [(loc, kind)]
    assert deployment.records.versions == []


def test_a_body_over_the_limit_is_413(client: TestClient) -> None:
    body = BODY | {"source": {"type": "rows", "rows": [{"a": "x" * LIMIT}]}}
    assert client.post(PREFIXES[0], json=body).status_code == 413
