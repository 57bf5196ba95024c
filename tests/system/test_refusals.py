"""What the real servers refuse, in which words, and that nothing is left of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.requests_of import changed
from tests.system.conftest import Deployment

pytestmark = pytest.mark.system
RATES = {"type": "float", "low": 1e-5, "high": 1e-3}
SUBMIT = "/post-training/v1/post-training/supervised-fine-tune"


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"colour": "red"}, "colour", "Extra inputs are not permitted"),
        ({"training_config__n_epochs": "two"}, "training_config.n_epochs", "got 'two'"),
        (
            {"training_config__data_config__dataset_id": "missing.jsonl"},
            "training_config.data_config.dataset_id",
            "no such file: 'missing.jsonl'",
        ),
        (
            {"training_config__data_config__dataset_id": "/etc/passwd"},
            "training_config.data_config.dataset_id",
            "must lie under",
        ),
        ({"model": "./no-such-model"}, "model", "no such file"),
        ({"algorithm_config__rank": 0}, "algorithm_config.rank", "got 0"),
        (
            {"hyperparam_search_config__space": {"model": RATES}, "hyperparam_search_config__n_trials": 2},
            "hyperparam_search_config.space.model",
            "cannot be searched",
        ),
        (
            {"hyperparam_search_config__space": {"lr": RATES}, "hyperparam_search_config__n_trials": 2},
            "hyperparam_search_config.space.lr",
            "is no field of a supervised_fine_tune request",
        ),
        (
            {"algorithm_config": {"type": "QAT", "quantizer_name": "int3", "group_size": 32}},
            "algorithm_config.quantizer_name",
            "got 'int3'",
        ),
        (
            {"training_config__efficiency_config": {"fsdp_cpu_offload": True}},
            "training_config.efficiency_config.fsdp_cpu_offload",
            "shards over several devices",
        ),
        ({"job_uuid": "a/b"}, "job_uuid", "may hold only"),
        ({"job_uuid": "a\n"}, "job_uuid", "may hold only"),
    ],
)
def test_bad_bodies(deployment: Deployment, changes: dict[str, Any], field: str, rule: str) -> None:
    body = changed(deployment.body("refused"), **changes)
    with deployment.http() as http:
        before = http.get("/api/v2/dags/supervised_fine_tune/dagRuns").json()["total_entries"]
        answer = http.post(SUBMIT, json=body)
        after = http.get("/api/v2/dags/supervised_fine_tune/dagRuns").json()["total_entries"]
        unknown = http.get("/post-training/v1/post-training/job/status", params={"job_uuid": "refused"})
    assert answer.status_code == 400
    (error,) = answer.json()["detail"]["errors"]
    assert ".".join(map(str, error["loc"])) == field
    assert rule in error["msg"]
    assert after == before
    assert deployment.runs_of("refused") == []
    assert unknown.status_code == 404


def test_a_body_of_50_megabytes(deployment: Deployment) -> None:
    body = json.dumps(deployment.body("x" * 50_000_000))
    with deployment.http() as http:
        answer = http.post(SUBMIT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert "the request body may have" in answer.json()["detail"]


def test_configs_as_json_strings_are_read(deployment: Deployment) -> None:
    body = deployment.body("as-text", n_epochs=0)
    body["training_config"] = json.dumps(body["training_config"])
    with deployment.http() as http:
        (error,) = http.post(SUBMIT, json=body).json()["detail"]["errors"]
    assert error["loc"] == ["training_config", "n_epochs"]


def test_who_may_do_what(deployment: Deployment) -> None:
    jobs = "/post-training/v1/post-training/jobs"
    with deployment.http("viewer") as viewer, deployment.http("user") as user:
        assert viewer.get(jobs).status_code == 200
        forbidden = viewer.post(SUBMIT, json=deployment.body("by-viewer"))
        assert forbidden.status_code == 403
        assert "may not start runs of the DAG 'supervised_fine_tune'" in forbidden.json()["detail"]
        # The user may: what is refused is the body.
        assert user.post(SUBMIT, json={}).status_code == 400
        for headers in ({"Authorization": ""}, {"Authorization": "Bearer nonsense"}):
            for path in (jobs, "/post-training/openapi.json"):
                assert viewer.get(path, headers=headers).status_code == 401, (headers, path)
        assert viewer.get("/post-training/openapi.json").json()["info"]["title"] == "Post-training"
