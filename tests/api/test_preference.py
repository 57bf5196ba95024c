"""Preference jobs over HTTP, in both forms of the body."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import PREFIXES, Deployment
from tests.requests_of import LORA, dpo_body, rlhf_body

SHORT_FORM = dpo_body(
    training_config__data_config__batch_size=4,
    training_config__data_config__shuffle=True,
    training_config__data_config__validation_dataset_id="test.jsonl",
    training_config__optimizer_config=rlhf_body()["optimizer_config"],
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("body", [SHORT_FORM, rlhf_body()], ids=["short", "long"])
def test_a_preference_jobs_way_through_the_api(
    deployment: Deployment, client: TestClient, prefix: str, body: dict[str, Any]
) -> None:
    path = f"{prefix}/preference-optimize"
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()) == (200, {"job_uuid": "job-1"})
    task = deployment.runs.tasks["job-1"]
    assert task.key.dag_id == "preference_optimize"
    assert task.conf["finetuned_model"] == "org/model"
    assert task.conf["training_config.data_config.dataset_id"] == "train.jsonl"
    assert client.get(f"{prefix}/jobs/job-1/status").json()["status"] == "scheduled"
    # One job, whichever form asks for it.
    for same in (SHORT_FORM, rlhf_body()):
        assert client.post(path, json=same).json() == {"job_uuid": "job-1"}
    assert deployment.runs.triggered == ["job-1"]
    assert client.post(path, json=body | {"algorithm_config": {"beta": 0.5}}).status_code == 409
    assert client.post(f"{prefix}/jobs/job-1/cancel").status_code == 200


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("body", "loc"),
    [
        (dpo_body(algorithm_config__gamma=2.0), ["algorithm_config", "gamma"]),
        (dpo_body(runtime={"adapter": LORA | {"rank": 0}}), ["runtime", "adapter", "rank"]),
        (dpo_body(finetuned_model=3), ["finetuned_model"]),
        (dpo_body(logger_config={"log_model": False}), ["logger_config", "log_model"]),
        (rlhf_body(algorithm="ppo"), ["algorithm"]),
        (rlhf_body(finetuned_model__uri=""), ["finetuned_model", "uri"]),
        (rlhf_body(algorithm_config="{"), ["algorithm_config"]),
        (rlhf_body(runtime={"export": "merged"}), ["runtime", "export"]),
        (
            rlhf_body(
                training_config__data_config=SHORT_FORM["training_config"]["data_config"], dataset_id="a"
            ),
            ["dataset_id"],
        ),
    ],
)
def test_a_preference_request_is_refused_by_its_own_field(
    deployment: Deployment, client: TestClient, prefix: str, body: dict[str, Any], loc: list[str]
) -> None:
    answer = client.post(f"{prefix}/preference-optimize", json=body)
    assert answer.status_code == 400
    assert [error["loc"] for error in answer.json()["detail"]["errors"]] == [loc]
    assert deployment.tracking.runs == {}
