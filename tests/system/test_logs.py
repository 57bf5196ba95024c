"""A job's log on the real servers: followed over a killed trainer to its end, and read by pages."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from tests.sse import events, lines_of
from tests.system.conftest import Deployment, trainers_of
from tests.waiting import wait_until

pytestmark = pytest.mark.system

PATH = "/post-training/v1alpha/post-training/jobs/followed/logs"
STREAM = {"Accept": "text/event-stream"}


def the_trainer_of(job_uuid: str) -> psutil.Process:
    """Wait for a job's trainer process."""
    return wait_until(lambda: trainers_of(job_uuid))[0]


def test_a_job_is_followed_over_a_killed_trainer_to_its_end(deployment: Deployment) -> None:
    deployment.client().post_training.supervised_fine_tune(**deployment.body("followed"))
    found: list[Any] = []
    with deployment.http() as http:
        with http.stream("GET", PATH, headers=STREAM) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            the_trainer_of("followed").kill()
            found.extend(events(answer.iter_lines()))
        status = http.get(PATH.replace("/logs", "/status")).json()
        whole = http.get(PATH).json()
        pages, offset = [], 0
        while offset is not None:
            page = http.get(PATH, params={"offset": offset, "limit": 7}).json()
            assert len(page["log_lines"]) == 7 or page["next_offset"] is None
            pages += page["log_lines"]
            offset = page["next_offset"]
        with http.stream("GET", PATH, headers=STREAM | {"Last-Event-ID": "9"}) as answer:
            resumed = list(events(answer.iter_lines()))
        task = http.get("/api/v2/dags/supervised_fine_tune/dagRuns/followed/taskInstances/train").json()
    assert (task["try_number"], status["status"]) == (2, "completed")
    assert found[-1] == ("status", "", status)
    lines = lines_of(found)
    assert lines == whole["log_lines"] == pages
    assert whole["next_offset"] is None
    assert [at for event, at, _ in found if event == "log"][-1] == str(len(lines))
    first_failure = next(n for n, line in enumerate(lines) if line.startswith("Task failed with exception: "))
    last_step = next(n for n, line in enumerate(lines) if "progress step 6/6" in line)
    assert first_failure < last_step
    assert lines_of(resumed) == lines[9:]
    assert resumed[-1] == found[-1]
    assert not any(line.startswith("::") or "/attempt=" in line for line in lines)
