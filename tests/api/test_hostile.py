"""Calls that no honest client makes: bodies that are no JSON, ids that are no ids, other methods."""

from __future__ import annotations

import pytest

from post_training.api.json_body import JsonRoute
from tests.api.conftest import LIMIT, PREFIXES, Deployment
from tests.hostile import DATASETS, JOB_IDS, raw_bodies
from tests.requests_of import sft_body

SUBMIT = "/v1/post-training/supervised-fine-tune"
BODIES = raw_bodies(sft_body(), depth=LIMIT // 6)


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request(deployment: Deployment, name: str) -> None:
    content, headers, sentence = BODIES[name]
    answer = deployment.client().post(SUBMIT, content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert any(sentence in error["msg"] for error in answer.json()["detail"]["errors"]), answer.text
    assert deployment.runs.tasks == {}
    assert not deployment.tracking.asked


@pytest.mark.parametrize("name", BODIES)
def test_who_calls_is_asked_before_the_body_is_judged(deployment: Deployment, name: str) -> None:
    content, headers, _ = BODIES[name]
    assert deployment.client("nobody").post(SUBMIT, content=content, headers=headers).status_code == 401


@pytest.mark.parametrize("path", ["/v1/post-training/job/cancel", "/v1/datasets"])
@pytest.mark.parametrize("content", [b'{"a": 1, "a": 2}', b'{"\\ud800": 1}', b'"', b"[" * 5000, b"\xff"])
def test_the_other_bodies_are_read_in_the_same_way(deployment: Deployment, path: str, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = deployment.client().post(path, content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["detail"]["errors"]


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_that_could_not_be_shown_is_not_registered(deployment: Deployment, name: str) -> None:
    client = deployment.client()
    body = {"purpose": "post-training/messages", "dataset_id": "math", **DATASETS[name]}
    answer = client.post("/v1/datasets", json=body)
    assert answer.status_code == 400, answer.text
    (error,) = answer.json()["detail"]["errors"]
    assert error["msg"].startswith("may be nested 64 levels deep")
    assert client.get("/v1/datasets").json() == {"data": []}


def test_every_route_reads_strict_json(deployment: Deployment) -> None:
    described = [route for route in deployment.app.routes if getattr(route, "include_in_schema", False)]
    assert described
    assert [route for route in described if not isinstance(route, JsonRoute)] == []


@pytest.mark.parametrize("job_id", JOB_IDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_id_that_is_none(deployment: Deployment, prefix: str, job_id: str) -> None:
    client = deployment.client()
    client.post(SUBMIT, json=sft_body())
    for name in ("status", "artifacts", "logs"):
        by_path = client.get(f"{prefix}/jobs/{job_id}/{name}")
        by_query = client.get(f"{prefix}/job/{name}?job_uuid={job_id}")
        assert by_path.status_code == 404, by_path.text
        assert by_query.status_code in (400, 404), by_query.text
    assert client.post(f"{prefix}/jobs/{job_id}/cancel").status_code == 404
    assert deployment.runs.tasks["job-1"].state is None


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "BREW"])
@pytest.mark.parametrize("caller", ["admin", "nobody"])
def test_a_method_that_a_route_does_not_have(deployment: Deployment, method: str, caller: str) -> None:
    for path in (SUBMIT, "/v1/post-training/jobs", "/v1/post-training/jobs/job-1/status"):
        answer = deployment.client(caller).request(method, path)
        assert answer.status_code == 405, answer.text
    assert deployment.runs.tasks == {}


def test_a_query_of_60_kilobytes(deployment: Deployment) -> None:
    answer = deployment.client().get(f"/v1/post-training/job/status?job_uuid={'a' * 60_000}")
    assert answer.status_code == 400
    assert len(answer.content) < 1_000
