"""Generated calls of every route that OpenAPI describes: no 5xx, nothing undocumented, nothing half made.

Deterministic: the same calls each time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api.conftest import Deployment
from tests.hostile import DATASETS, near
from tests.requests_of import OPTIMIZER, dpo_body, rlhf_body, sft_body

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
IDS = ["job-1", "job-2", "job-3"]
DATASET = {
    "purpose": "post-training/messages",
    "source": {"rows": [{"question": "2+2?", "answer": "4"}]},
    "metadata": {"by": "hand"},
}
SUBMITS = {
    "supervised-fine-tune": [sft_body(training_config__optimizer_config=OPTIMIZER)],
    "preference-optimize": [dpo_body(), rlhf_body()],
}


def bounded(examples: int) -> settings:
    """Return the settings of a test that does the same each time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def call_everything(
    deployment: Deployment, mode: GenerationMode, token: str, check: Callable[[Any, Any], None]
) -> None:
    """Call every operation with what its schema allows, or with what it does not."""
    admin, caller = ({"Authorization": f"Bearer {name}"} for name in ("admin", token))
    schema = schemathesis.openapi.from_asgi("/openapi.json", deployment.app, headers=admin)
    for operation in schema.get_all_operations():

        @bounded(12)
        @given(case=operation.ok().as_strategy(generation_mode=mode))
        def call(case: Any) -> None:
            check(case, case.call(headers=caller))

        call()


def assert_nothing_half_made(deployment: Deployment, accepted: set[str]) -> None:
    """Every accepted job has one task and one run; nothing else has."""
    assert set(deployment.runs.tasks) == accepted
    runs = Counter(run.tags["post_training.job_uuid"] for run in deployment.tracking.runs.values())
    assert runs == Counter(accepted)


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_a_documented_one(deployment: Deployment, mode: GenerationMode) -> None:
    accepted: set[str] = set()

    def check(case: Any, answer: Any) -> None:
        too_large = answer.status_code == 413  # which schemathesis takes for no refusal
        checks = CHECKS if too_large else [*CHECKS, negative_data_rejection]
        case.validate_response(answer, checks=checks)
        assert "Traceback" not in answer.text
        if answer.status_code == 200 and case.path.endswith(("tune", "optimize")):
            accepted.add(answer.json()["job_uuid"])

    call_everything(deployment, mode, "admin", check)
    assert_nothing_half_made(deployment, accepted)


@pytest.mark.parametrize("mode", GenerationMode)
def test_nobody_learns_anything(deployment: Deployment, mode: GenerationMode) -> None:
    """Not even whether the body could be read."""

    def check(case: Any, answer: Any) -> None:
        assert answer.status_code in (401, 413), (case.as_curl_command(), answer.text)

    call_everything(deployment, mode, "nobody", check)
    assert_nothing_half_made(deployment, set())


@pytest.mark.parametrize("route", SUBMITS)
def test_a_submit_takes_effect_or_is_refused(deployment: Deployment, route: str) -> None:
    """Bodies near valid ones, under ids that meet: accepted, refused, or in conflict with what was."""
    client, accepted, answers = deployment.client(), set[str](), Counter[int]()

    @bounded(300)
    @given(body=st.one_of(*(near(body, IDS) for body in SUBMITS[route])))
    def submit(body: dict[str, Any]) -> None:
        answer = client.post(
            f"/v1/post-training/{route}",
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )
        answers[answer.status_code] += 1
        assert answer.status_code in (200, 400, 409), answer.text
        if answer.status_code == 200:
            accepted.add(answer.json()["job_uuid"])
        if answer.status_code == 400:
            assert all(set(error) == {"loc", "msg", "type"} for error in answer.json()["detail"]["errors"])

    submit()
    assert set(answers) == {200, 400, 409}, answers
    assert_nothing_half_made(deployment, accepted)


def test_what_is_registered_can_be_read(deployment: Deployment) -> None:
    """Bodies near a valid one are refused, or shown again by every route."""
    client, answers = deployment.client(), Counter[int]()
    bodies = [DATASET, *(DATASET | deep for deep in DATASETS.values())]

    @bounded(300)
    @given(body=st.one_of(*(near(body, IDS, name="dataset_id") for body in bodies)))
    def register(body: dict[str, Any]) -> None:
        answer = client.post(
            "/v1/datasets", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        answers[answer.status_code] += 1
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            registered = answer.json()
            assert client.get(f"/v1/datasets/{registered['identifier']}").json() == registered
            assert client.get("/v1/datasets").status_code == 200

    register()
    assert set(answers) == {200, 400}, answers
