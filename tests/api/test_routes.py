"""Every route: its answers, its refusals, and what it does for whom."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi import FastAPI, HTTPException, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.testclient import TestClient

from post_training.api.app import create_app
from post_training.errors import InvalidRequestError, RecordUnavailableError
from post_training.jobs import JobService
from tests.fakes import FakeAccess, FakeRuns, FakeTracking
from tests.requests_of import dpo_body, sft_body
from tests.test_jobs import Accepting

PREFIXES = ("/v1/post-training", "/v1alpha/post-training")
READS = ("status", "artifacts", "logs")
LIMIT = 20_000


class Deployment:
    """The app over fakes; a token says who calls."""

    def __init__(self) -> None:
        self.runs, self.tracking, self.resolver = FakeRuns(), FakeTracking(), Accepting()
        self.service = JobService(self.runs, lambda: self.tracking, self.resolver)  # type: ignore[arg-type, return-value]
        self.callers = {
            "admin": FakeAccess("admin"),
            "viewer": FakeAccess("viewer", trigger=False, cancel=False),
            "stranger": FakeAccess("stranger", read=False, trigger=False, cancel=False),
        }

        def current_access(
            token: HTTPAuthorizationCredentials = Security(HTTPBearer()),
        ) -> FakeAccess:
            caller = self.callers.get(token.credentials)
            if caller is None:
                raise HTTPException(401, "Not authenticated")
            return caller

        self.app: FastAPI = create_app(self.service, current_access, max_body_bytes=LIMIT)

    def client(self, caller: str = "admin") -> TestClient:
        return TestClient(
            self.app, headers={"Authorization": f"Bearer {caller}"}, raise_server_exceptions=False
        )


@pytest.fixture
def deployment() -> Deployment:
    return Deployment()


@pytest.fixture
def client(deployment: Deployment) -> TestClient:
    return deployment.client()


def submit(client: TestClient, prefix: str = PREFIXES[0], **changes: Any) -> httpx.Response:
    return client.post(f"{prefix}/supervised-fine-tune", json=sft_body(**changes))


def every_route(job_uuid: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return method, path and arguments of each route of the API."""
    routes: list[tuple[str, str, dict[str, Any]]] = []
    for prefix in PREFIXES:
        routes.append(("POST", f"{prefix}/supervised-fine-tune", {"json": sft_body()}))
        routes.append(("POST", f"{prefix}/preference-optimize", {"json": dpo_body()}))
        routes.append(("GET", f"{prefix}/jobs", {}))
        for name in READS:
            routes.append(("GET", f"{prefix}/job/{name}", {"params": {"job_uuid": job_uuid}}))
            routes.append(("GET", f"{prefix}/jobs/{job_uuid}/{name}", {}))
        routes.append(("POST", f"{prefix}/job/cancel", {"json": {"job_uuid": job_uuid}}))
        routes.append(("POST", f"{prefix}/jobs/{job_uuid}/cancel", {}))
    return routes


def test_the_list_above_is_every_route(deployment: Deployment) -> None:
    described = {
        (method.upper(), path) for path, item in deployment.app.openapi()["paths"].items() for method in item
    }
    assert {(method, path) for method, path, _ in every_route("{job_uuid}")} == described


@pytest.mark.parametrize(("method", "path", "arguments"), every_route("job-1"))
def test_nobody_enters_without_a_token(
    deployment: Deployment, method: str, path: str, arguments: dict[str, Any]
) -> None:
    answer = deployment.client("nobody").request(method, path, **arguments)
    assert (answer.status_code, answer.json()) == (401, {"detail": "Not authenticated"})


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_the_description_is_behind_the_same_door(deployment: Deployment, path: str) -> None:
    assert deployment.client("nobody").get(path).status_code == 401
    assert deployment.client("viewer").get(path).status_code == 200


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


@pytest.mark.parametrize("changes", [{"hyperparam_search_config": {"\ud800": 1}}, {"model": "\ud800"}])
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
    answer = client.post("/v1/post-training/preference-optimize", json=dpo_body())
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


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ({}, True),
        ({"training_config": "{}", "algorithm_config": "{}"}, True),
        ({"algorithm_config": None, "runtime": None, "model": None}, True),
        ({"job_uuid": "scheduled__1"}, False),
        ({"job_uuid": "a..b"}, False),
        ({"job_uuid": "a/b"}, False),
        ({"colour": "red"}, False),
        ({"training_config__n_epochs": 0}, False),
        ({"training_config__dtype": "fp8"}, False),
        ({"algorithm_config__rank": "4"}, False),
        ({"hyperparam_search_config": {"n_trials": 3}}, False),
        ({"logger_config": {"wandb": True}}, False),
        ({"runtime": {"devices": 2}}, False),
    ],
)
def test_what_is_described_is_what_is_accepted(
    deployment: Deployment, changes: dict[str, Any], accepted: bool
) -> None:
    document = deployment.client().get("/openapi.json").json()
    schema = {
        "$ref": "#/components/schemas/SupervisedFineTuneRequest",
        "components": document["components"],
    }
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(sft_body(**changes)) is accepted


def test_the_description_is_strict(deployment: Deployment) -> None:
    document = deployment.client().get("/openapi.json").json()
    bodies = [name for name in document["components"]["schemas"] if name.endswith("Request")]
    assert bodies
    for name in bodies:
        assert document["components"]["schemas"][name]["additionalProperties"] is False
    for path, item in document["paths"].items():
        for operation in item.values():
            assert operation["security"], path
            assert {"200", "401"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"], path
