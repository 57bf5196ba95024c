"""What hangs in one place holds up nothing elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic, sleep
from typing import Any

import fastapi.routing
import httpx
import pytest
from fastapi.security import HTTPBearer
from fastapi.testclient import TestClient

from post_training.api import json_body
from post_training.api.app import create_app
from post_training.api.capacity import Capacity, Places, Threads
from post_training.api.json_body import QUICK_BYTES
from post_training.errors import BusyError
from post_training.schemas.base import load_json
from tests.api.conftest import Deployment
from tests.api.server import PATHS, Server
from tests.fakes import FakeAccess


@pytest.fixture
def server(deployment: Deployment) -> Iterator[Server]:
    """Few threads, and little patience."""
    with Server(deployment, Capacity(Threads(2, 0.3), Threads(1, 0.3), Places(3, 3))) as server:
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


def test_no_user_takes_all_places_and_who_leaves_makes_room() -> None:
    places = Places(3, of_one_user=2)
    with ExitStack() as held:
        held.enter_context(places.one("ann"))
        with places.one("ann"):
            with pytest.raises(BusyError, match="2 clients of ann"), places.one("ann"):
                pass
            with places.one("bob"), pytest.raises(BusyError, match="^3 clients"), places.one("eve"):
                pass
        with places.one("ann"), places.one("eve"):
            pass
    with places.one("ann"), places.one("ann"), places.one("bob"):
        pass


def test_a_large_body_holds_up_no_event_loop(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is parsed elsewhere; a small one is not worth a thread."""
    seen: dict[str, list[int]] = {"loop": [], "parse": []}

    def parse(text: bytes) -> Any:
        seen["parse"].append(threading.get_ident())
        return load_json(text)

    async def access() -> FakeAccess:
        seen["loop"].append(threading.get_ident())
        return FakeAccess()

    monkeypatch.setattr(json_body, "load_json", parse)
    app = create_app(
        deployment.service, deployment.datasets, deployment.logs, access, max_body_bytes=10 * QUICK_BYTES
    )
    client = TestClient(app)
    names = ", ".join(f'"n{number:05}": 0' for number in range(15_000))
    bodies = (b'{"a": 1, "a": 2}', f'{{{names}, "n00000": 1}}'.encode())
    assert len(bodies[1]) > 3 * QUICK_BYTES
    for body in bodies:
        answer = client.post("/v1/datasets", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        (error,) = answer.json()["detail"]["errors"]
        assert error["type"] == "json_invalid"
        assert error["msg"].endswith("twice")
    assert [parsed == loop for parsed, loop in zip(seen["parse"], seen["loop"], strict=True)] == [True, False]
