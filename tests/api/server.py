"""The app on a real port, beside another one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response

from post_training.api.app import create_app
from post_training.api.capacity import Capacity
from post_training.api.log_stream import Pace
from post_training.job_ids import TaskKey
from post_training.schemas.jobs import JobStatus
from post_training.standalone_layout import free_ports
from tests.api.conftest import LIMIT, PREFIXES, Deployment
from tests.fakes import task
from tests.sse import Event, events
from tests.waiting import wait_until

KEY = TaskKey("supervised_fine_tune", "job-1", "train")
PATHS = [
    path
    for prefix in PREFIXES
    for path in (f"{prefix}/job/logs?job_uuid=job-1", f"{prefix}/jobs/job-1/logs?")
]
QUICK = Pace(poll=0.02, linger=dict.fromkeys(JobStatus, 0.1))
STREAM = {"Accept": "text/event-stream"}


async def _pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


class Server:
    """The app beside another one, in one process, on a real port; behind middleware like Airflow's."""

    def __init__(
        self, deployment: Deployment, capacity: Capacity, pace: Pace = QUICK, send_seconds: float = 60.0
    ) -> None:
        self.runs, self.tracking = deployment.runs, deployment.tracking
        root = FastAPI()
        root.get("/page")(lambda: "Airflow's own")
        app = create_app(
            deployment.service,
            deployment.datasets,
            deployment.logs,
            deployment.views,
            deployment.current_access,
            max_body_bytes=LIMIT,
            capacity=capacity,
            pace=pace,
            send_seconds=send_seconds,
        )
        root.mount("/post-training", app)
        root.add_middleware(BaseHTTPMiddleware, dispatch=_pass_on)
        root.add_middleware(GZipMiddleware, minimum_size=10)
        (self.port,) = free_ports(1)
        config = uvicorn.Config(root, host="127.0.0.1", port=self.port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def http(self, caller: str = "admin") -> httpx.Client:
        headers = {"Authorization": f"Bearer {caller}"}
        return httpx.Client(base_url=f"{self.url}/post-training", headers=headers, timeout=120)

    @contextmanager
    def follow(self, query: str = "", **headers: str) -> Iterator[Iterator[Event]]:
        """Open a stream; yield its events."""
        with self.http() as http, http.stream("GET", PATHS[0] + query, headers=STREAM | headers) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield events(answer.iter_lines())


def set_task(deployment: Any, state: str | None, attempt: int) -> None:
    deployment.runs.add(replace(task(KEY, state), attempt=attempt))
