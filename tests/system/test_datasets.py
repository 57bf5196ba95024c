"""Registered data sets on the real servers, with the published client."""

from __future__ import annotations

import json
from typing import Any

import llama_stack_client
import pytest

from tests.system.conftest import Deployment

pytestmark = pytest.mark.system

ROWS = [{"question": f"How many are {i} pears?", "answer": f"There are {i} pears."} for i in range(8)]
OTHER_ROWS = [{"question": "What is left?", "answer": "Nothing."}] * 4


def register(deployment: Deployment, rows: list[dict[str, Any]]) -> Any:
    return deployment.client().datasets.register(
        dataset_id="pears", purpose="post-training/messages", source={"type": "rows", "rows": rows}
    )


def start(deployment: Deployment, job_uuid: str, dataset_id: str) -> None:
    """Start a job on the data set."""
    data = deployment.body("x")["training_config"]["data_config"] | {"dataset_id": dataset_id}
    body = deployment.body(job_uuid, n_epochs=1, max_steps_per_epoch=1, data_config=data)
    deployment.client().post_training.supervised_fine_tune(**body)


def read_by(deployment: Deployment, job_uuid: str) -> Any:
    """Return what MLflow says that the job read, once it has ended."""
    status = deployment.wait(job_uuid)
    assert status.status == "completed", status
    (run,) = deployment.runs_of(job_uuid)
    (entry,) = run.inputs.dataset_inputs
    return entry.dataset


def refusal(deployment: Deployment, dataset_id: str) -> dict[str, Any]:
    """Return the broken rule that a request with this data set is refused for."""
    data = deployment.body("x")["training_config"]["data_config"] | {"dataset_id": dataset_id}
    with pytest.raises(llama_stack_client.BadRequestError) as caught:
        deployment.client().post_training.supervised_fine_tune(**deployment.body("no", data_config=data))
    (error,) = caught.value.response.json()["detail"]["errors"]
    return dict(error)


def test_a_job_records_the_version_that_it_read(deployment: Deployment) -> None:
    """That which the name meant when the job was asked for, whatever it means when the job runs."""
    client = deployment.client()
    first = register(deployment, ROWS)
    assert client.datasets.retrieve("pears").source.rows == ROWS
    assert register(deployment, ROWS).created_at == first.created_at
    start(deployment, "pears-1", "pears")

    second = register(deployment, OTHER_ROWS)
    assert second.version != first.version
    assert [entry.version for entry in client.datasets.list()] == [second.version]
    start(deployment, "pears-2", f"pears@{first.version[:8]}")
    start(deployment, "pears-3", "pears")

    client.datasets.unregister("pears")
    assert client.datasets.list() == []
    for name in ("pears", f"pears@{first.version[:8]}"):
        assert refusal(deployment, name)["loc"] == ["training_config", "data_config", "dataset_id"]
    start(deployment, "pears-4", first.source.uri)  # what a job read stays readable

    read = {number: read_by(deployment, f"pears-{number}") for number in range(1, 5)}
    assert read[1].name == "pears"
    assert first.version.startswith(read[1].digest)
    assert {number: json.loads(dataset.profile)["sha256"] for number, dataset in read.items()} == {
        1: first.version,
        2: first.version,
        3: second.version,
        4: first.version,
    }


def test_a_viewer_reads_and_changes_nothing(deployment: Deployment) -> None:
    viewer = deployment.client("viewer")
    assert viewer.datasets.list() is not None
    with pytest.raises(llama_stack_client.PermissionDeniedError):
        viewer.datasets.register(purpose="post-training/messages", source={"type": "rows", "rows": ROWS})
    with pytest.raises(llama_stack_client.PermissionDeniedError):
        viewer.datasets.unregister("pears")
    with pytest.raises(llama_stack_client.NotFoundError):
        viewer.datasets.retrieve("nobody")
    with deployment.http() as http:
        anonymous = http.get("/post-training/v1beta/datasets", headers={"Authorization": ""})
    assert anonymous.status_code == 401
