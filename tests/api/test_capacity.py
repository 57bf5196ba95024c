"""What hangs in one place holds up nothing elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep

import fastapi.routing
import httpx
import pytest
from fastapi.security import HTTPBearer

from post_training.api.capacity import Capacity, Places, Threads
from tests.api.conftest import Deployment
from tests.api.server import PATHS, Server


@pytest.fixture
def server(deployment: Deployment) -> Iterator[Server]:
    """Few threads, and little patience."""
    with Server(deployment, Capacity(Threads(2, 0.3), Threads(1, 0.3), Places(3))) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/post-training/jobs/job-1/status", PATHS[0], "/v1/datasets"])
def test_a_record_that_hangs_holds_up_nobody_elses_pages(
    deployment: Deployment, server: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    hung = threading.Event()
    find, listed = deployment.runs.find, deployment.datasets.list
    monkeypatch.setattr(deployment.runs, "find", lambda job_uuid: hung.wait(30) and find(job_uuid))
    monkeypatch.setattr(deployment.datasets, "list", lambda access: hung.wait(30) and listed(access))
    clients = 45  # more than the server's shared pool has threads
    with ThreadPoolExecutor(clients) as pool, server.http() as http:
        answers = [pool.submit(http.get, path) for _ in range(clients)]
        try:
            sleep(0.5)
            began = monotonic()
            page = httpx.get(f"{server.url}/page", timeout=5)
            assert (page.json(), monotonic() - began < 1) == ("Airflow's own", True)
            refused = next(answer.result(10) for answer in answers[3:])
        finally:
            hung.set()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")


def test_no_endpoint_runs_in_the_servers_shared_threads(deployment: Deployment) -> None:
    pending = [
        route.dependant for route in deployment.app.routes if isinstance(route, fastapi.routing.APIRoute)
    ]
    assert len(pending) > 20
    while pending:
        dependant = pending.pop()
        assert dependant.is_coroutine_callable or dependant.is_async_gen_callable, dependant.call
        pending += [inner for inner in dependant.dependencies if not isinstance(inner.call, HTTPBearer)]
