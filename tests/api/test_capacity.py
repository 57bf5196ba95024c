"""What hangs in one place holds up nothing elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import fastapi.routing
import httpx
import pytest
from fastapi import Depends
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
from tests.waiting import wait_until

CLIENTS = 45
"""More than the server's shared pool has threads."""


class Hung:
    """A record that answers nobody before it is let go."""

    def __init__(self, deployment: Deployment) -> None:
        self.arrived = 0
        self.waiting: list[Any] = []
        self.released = threading.Event()
        self._access = deployment.current_access
        self._find, self._list = deployment.runs.find, deployment.datasets.list
        deployment.current_access = self._counted()
        deployment.runs.find = lambda job_uuid: self._hang(self._find, job_uuid)  # type: ignore[method-assign]
        deployment.datasets.list = lambda access: self._hang(self._list, access)  # type: ignore[method-assign]

    def _hang(self, answer: Callable[[Any], Any], asked: Any) -> Any:
        self.waiting.append(asked)
        self.released.wait(60)
        return answer(asked)

    def _counted(self) -> Callable[..., Any]:
        async def current_access(access: FakeAccess = Depends(self._access)) -> FakeAccess:
            self.arrived += 1
            return access

        return current_access


@pytest.fixture
def hung(deployment: Deployment) -> Iterator[Hung]:
    """What the server asks hangs until the end of the test."""
    hung = Hung(deployment)
    yield hung
    hung.released.set()


SOME_PATHS = pytest.mark.parametrize(
    "path", ["/v1/post-training/jobs/job-1/status", PATHS[0], "/v1/datasets"]
)


@SOME_PATHS
def test_a_record_that_hangs_holds_up_nobody_elses_pages(
    deployment: Deployment, hung: Hung, path: str
) -> None:
    capacity = Capacity(Threads(2, 60.0), Threads(2, 60.0), Places(3, 3))
    with Server(deployment, capacity) as server, ThreadPoolExecutor(CLIENTS) as pool, server.http() as http:
        answers = [pool.submit(http.get, path) for _ in range(CLIENTS)]
        try:
            wait_until(lambda: (hung.arrived, len(hung.waiting)) == (CLIENTS, 2))
            assert httpx.get(f"{server.url}/page", timeout=20).json() == "Airflow's own"
            assert not any(answer.done() for answer in answers)
        finally:
            hung.released.set()
        assert 503 not in {answer.result(60).status_code for answer in answers}


@SOME_PATHS
def test_who_does_not_get_a_turn_in_time_is_refused(deployment: Deployment, hung: Hung, path: str) -> None:
    capacity = Capacity(Threads(1, 0.05), Threads(1, 0.05), Places(3, 3))
    with Server(deployment, capacity) as server, ThreadPoolExecutor(1) as pool, server.http() as http:
        first = pool.submit(http.get, path)
        try:
            wait_until(lambda: len(hung.waiting) == 1)
            refused = http.get(path)
            assert not first.done()
        finally:
            hung.released.set()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert first.result(60).status_code != 503


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
            with places.one("bob"), pytest.raises(BusyError, match="3 clients follow"), places.one("eve"):
                pass
        with places.one("ann"), places.one("eve"):
            pass
    with places.one("ann"), places.one("ann"), places.one("bob"):
        pass


def test_a_large_body_holds_up_no_event_loop(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
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
        deployment.service,
        deployment.datasets,
        deployment.logs,
        deployment.views,
        access,
        max_body_bytes=10 * QUICK_BYTES,
    )
    client = TestClient(app)
    names = ", ".join(f'"n{number:05}": 0' for number in range(16_000))
    bodies = (b'{"a": 1, "a": 2}', f'{{{names}, "n15999": 1}}'.encode())
    assert len(bodies[1]) > 3 * QUICK_BYTES
    for body in bodies:
        answer = client.post("/v1/datasets", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        (error,) = answer.json()["detail"]["errors"]
        assert error["type"] == "json_invalid"
        assert error["msg"].endswith("twice")
    assert [parsed == loop for parsed, loop in zip(seen["parse"], seen["loop"], strict=True)] == [True, False]
