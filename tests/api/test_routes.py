"""Every route: its answers, its refusals, and what it does for whom."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from post_training.errors import InvalidRequestError, RecordUnavailableError
from tests.api.conftest import LIMIT, PREFIXES, Deployment
from tests.requests_of import dpo_body, rlhf_body, sft_body

READS = ("status", "artifacts", "logs")


def submit(client: TestClient, prefix: str = PREFIXES[0], **changes: Any) -> httpx.Response:
    return client.post(f"{prefix}/supervised-fine-tune", json=sft_body(**changes))


def every_route(job_uuid: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return method, path and arguments of each route of the API."""
    routes: list[tuple[str, str, dict[str, Any]]] = []
    for prefix in PREFIXES:
        routes.append(("POST", f"{prefix}/supervised-fine-tune", {"json": sft_body()}))
        routes += [
            ("POST", f"{prefix}/preference-optimize", {"json": body}) for body in (dpo_body(), rlhf_body())
        ]
        routes.append(("GET", f"{prefix}/jobs", {}))
        for name in READS:
            routes.append(("GET", f"{prefix}/job/{name}", {"params": {"job_uuid": job_uuid}}))
            routes.append(("GET", f"{prefix}/jobs/{job_uuid}/{name}", {}))
        routes.append(("POST", f"{prefix}/job/cancel", {"json": {"job_uuid": job_uuid}}))
        routes.append(("POST", f"{prefix}/jobs/{job_uuid}/cancel", {}))
        routes.append(("POST", f"{prefix}/reconcile", {}))
    return routes


def test_the_list_above_is_every_route(deployment: Deployment) -> None:
    described = {
        (method.upper(), path)
        for path, item in deployment.app.openapi()["paths"].items()
        for method in item
        if "/post-training/" in path
    }
    assert {(method, path) for method, path, _ in every_route("{job_uuid}")} == described


@pytest.mark.parametrize(("method", "path", "arguments"), every_route("job-1"))
def test_nobody_enters_without_a_token(
    deployment: Deployment, method: str, path: str, arguments: dict[str, Any]
) -> None:
    answer = deployment.client("nobody").request(method, path, **arguments)
    assert (answer.status_code, answer.json()) == (401, {"detail": "Not authenticated"})


def test_the_description_is_behind_the_same_door(deployment: Deployment) -> None:
    assert deployment.client("nobody").get("/openapi.json").status_code == 401
    assert deployment.client("viewer").get("/openapi.json").status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_loads_its_scripts_from_elsewhere(deployment: Deployment, path: str) -> None:
    assert deployment.client("viewer").get(path).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "arguments"),
    [route for route in every_route("job-1") if route[0] == "POST"],
)
def test_a_viewer_may_start_and_stop_nothing(
    deployment: Deployment, method: str, path: str, arguments: dict[str, Any]
) -> None:
    submit(deployment.client())
    assert deployment.client("viewer").request(method, path, **arguments).status_code == 403
    assert deployment.runs.tasks["job-1"].state is None


@pytest.mark.parametrize(
    ("method", "path", "arguments"), [route for route in every_route("job-1") if "/job" in route[1]]
)
def test_a_job_of_a_dag_that_may_not_be_read_does_not_exist(
    deployment: Deployment, method: str, path: str, arguments: dict[str, Any]
) -> None:
    submit(deployment.client())
    answer = deployment.client("stranger").request(method, path, **arguments)
    if path.endswith("/jobs"):
        assert answer.json() == {"data": []}
    else:
        assert (answer.status_code, answer.json()) == (404, {"detail": "no post-training job 'job-1'"})


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_jobs_way_through_the_api(client: TestClient, prefix: str) -> None:
    answer = submit(client, prefix)
    assert (answer.status_code, answer.json()) == (200, {"job_uuid": "job-1"})
    assert client.get(f"{prefix}/jobs").json() == {"data": [{"job_uuid": "job-1"}]}
    by_query = client.get(f"{prefix}/job/status", params={"job_uuid": "job-1"}).json()
    by_path = client.get(f"{prefix}/jobs/job-1/status").json()
    assert by_query == by_path
    assert by_query["status"] == "scheduled"
    assert client.get(f"{prefix}/jobs/job-1/artifacts").json() == {"job_uuid": "job-1", "checkpoints": []}
    cancelled = client.post(f"{prefix}/job/cancel", json={"job_uuid": "job-1"}, headers={"Accept": "*/*"})
    assert (cancelled.status_code, cancelled.json()) == (200, None)
    again = client.post(f"{prefix}/jobs/job-1/cancel")
    assert again.status_code == 409
    assert again.headers["x-should-retry"] == "false"


def test_several_broken_rules_are_one_answer(client: TestClient) -> None:
    body = sft_body(runtime={"reference_logprobs": "live"}, logger_config={"log_model": False})
    answer = client.post("/v1/post-training/supervised-fine-tune", json=body)
    assert {".".join(error["loc"]) for error in answer.json()["detail"]["errors"]} == {
        "runtime.reference_logprobs",
        "logger_config.log_model",
    }


def test_the_same_request_twice_and_another_one(client: TestClient) -> None:
    assert submit(client).json() == submit(client).json()
    other = submit(client, training_config__n_epochs=3)
    assert other.status_code == 409
    assert other.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("content", "loc", "kind"),
    [
        ('{"job_uuid": "a"', None, "json_invalid"),
        ("[]", [], "model_attributes_type"),
        ('{"job_uuid": "a"}', ["training_config"], "missing"),
    ],
)
def test_a_broken_body_is_400_in_the_contracts_form(
    client: TestClient, content: str, loc: list[str] | None, kind: str
) -> None:
    answer = client.post(
        "/v1/post-training/supervised-fine-tune",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    errors = answer.json()["detail"]["errors"]
    assert kind in {error["type"] for error in errors}
    assert all(set(error) == {"loc", "msg", "type"} for error in errors)
    if loc is not None:
        assert loc in [error["loc"] for error in errors]


@pytest.mark.parametrize("content", [b"\xff", b"[" * 5000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"1" * 5000])
def test_a_body_that_cannot_be_parsed_is_400_in_the_same_form(client: TestClient, content: bytes) -> None:
    answer = client.post(
        "/v1/post-training/supervised-fine-tune",
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["detail"]["errors"]


@pytest.mark.parametrize(
    "changes",
    [
        {"hyperparam_search_config": {"\ud800": 1}},
        {"hyperparam_search_config": '{"\\ud800": 1}'},
        {"logger_config": '{"tags": {"a": "\\ud800"}}'},
        {"logger_config": {"tags": {"a": "\0"}}},
        {"model": "\ud800"},
    ],
)
def test_half_characters_are_refused(client: TestClient, changes: dict[str, Any]) -> None:
    answer = client.post(
        "/v1/post-training/supervised-fine-tune",
        content=json.dumps(sft_body(**changes)),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400
    assert answer.json()["detail"]["errors"][0]["type"] == "string_unicode"


def test_a_job_is_cancelled_by_query_too_but_named_once(client: TestClient) -> None:
    submit(client)
    path = "/v1alpha/post-training/job/cancel"
    assert client.post(path).status_code == 400
    both = client.post(path, params={"job_uuid": "job-1"}, json={"job_uuid": "job-2"})
    assert both.json()["detail"]["errors"][0]["loc"] == ["job_uuid"]
    assert client.post(path, params={"job_uuid": "job-1"}).status_code == 200


def test_logs_need_the_right_to_read_logs(deployment: Deployment, client: TestClient) -> None:
    submit(client)
    deployment.callers["admin"].logs = False
    answer = client.get("/v1/post-training/job/logs", params={"job_uuid": "job-1"})
    assert answer.status_code == 403


def test_a_missing_query_is_400(client: TestClient) -> None:
    answer = client.get("/v1/post-training/job/status")
    assert answer.json()["detail"]["errors"] == [
        {"loc": ["job_uuid"], "msg": "Field required", "type": "missing"}
    ]


def test_what_cannot_be_trained_or_found_is_400(deployment: Deployment, client: TestClient) -> None:
    flags = {"fsdp_cpu_offload": True}
    for path, body in (("supervised-fine-tune", sft_body), ("preference-optimize", dpo_body)):
        answer = client.post(f"/v1/post-training/{path}", json=body(training_config__efficiency_config=flags))
        assert answer.status_code == 400
        assert answer.json()["detail"]["errors"][0]["type"] == "unsupported"
    deployment.resolver.error = InvalidRequestError.of("model", "no such file")
    assert submit(client).json()["detail"]["errors"][0]["loc"] == ["model"]


def test_without_the_record_the_client_is_told_when_to_come_again(
    deployment: Deployment, client: TestClient
) -> None:
    deployment.tracking.down = True
    answer = submit(client)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert RecordUnavailableError("MLflow does not answer").args[0] == answer.json()["detail"]


def test_a_body_over_the_limit_is_413_announced_or_not(client: TestClient) -> None:
    large = b'{"job_uuid": "' + b"x" * LIMIT + b'"}'
    headers = {"Content-Type": "application/json"}
    announced = client.post("/v1/post-training/supervised-fine-tune", content=large, headers=headers)
    pieces = (large[start : start + 1000] for start in range(0, len(large), 1000))
    streamed = client.post("/v1/post-training/supervised-fine-tune", content=pieces, headers=headers)
    for answer in (announced, streamed):
        assert answer.status_code == 413
        assert answer.json() == {"detail": f"the request body may have {LIMIT} bytes"}
