"""What a query says is read or refused."""

from __future__ import annotations

import pytest

from tests.api.conftest import Deployment

STATUS = "/v1/post-training/job/status"


@pytest.mark.parametrize(
    ("query", "name", "rule"),
    [
        ("?job_uuid=a&job_uuid=b", "job_uuid", "must be given once, got 2 values"),
        ("?job_uuid=a&colour=red", "colour", "is not known here"),
    ],
)
def test_a_query_that_would_be_ignored_is_refused(
    deployment: Deployment, query: str, name: str, rule: str
) -> None:
    answer = deployment.client("admin").get(f"{STATUS}{query}")
    assert answer.status_code == 400
    assert answer.json()["detail"]["errors"] == [
        {
            "loc": ["query", name],
            "msg": rule,
            "type": "extra_forbidden" if name == "colour" else "value_error",
        }
    ]


def test_who_is_not_known_is_told_nothing_of_it(deployment: Deployment) -> None:
    assert deployment.client("nobody").get(f"{STATUS}?colour=red").status_code == 401


def test_a_query_that_is_read_passes(deployment: Deployment) -> None:
    client = deployment.client("admin")
    assert client.get(f"{STATUS}?job_uuid=a").status_code == 404
    assert client.get("/v1/post-training/job/logs?job_uuid=a&limit=3&offset=0").status_code == 404
