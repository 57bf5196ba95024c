"""The real API over fakes on a real port, for what reaches it through a connection."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from fastapi import Body, FastAPI, HTTPException, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from post_training.api.app import create_app
from post_training.dataset_registry import DatasetService
from post_training.job_views import JobViews
from post_training.jobs import JobService
from post_training.logs import LogService
from post_training.standalone_layout import free_ports
from tests.fakes import FakeAccess, FakeDatasetRecords, FakeRuns, FakeTracking
from tests.test_jobs import Accepting
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer
    from tests.operators.stages import StageWorkplace
    from tests.operators.workplace import Workplace


class ApiServer:
    """An api-server: Airflow's login and our app."""

    def __init__(self) -> None:
        self.runs, self.tracking = FakeRuns(), FakeTracking()
        self.service = JobService(self.runs, lambda: self.tracking, Accepting())  # type: ignore[arg-type, return-value]
        self.root = root = FastAPI()

        @root.post("/auth/token", status_code=201)
        def login(username: str = Body(), password: str = Body()) -> dict[str, str]:
            if password != "right":
                raise HTTPException(401, "Invalid credentials")
            return {"access_token": f"token-of-{username}"}

        def current_access(
            token: HTTPAuthorizationCredentials = Security(HTTPBearer()),
        ) -> FakeAccess:
            if token.credentials != "token-of-admin":
                raise HTTPException(401, "Not authenticated")
            return FakeAccess("admin")

        datasets = DatasetService(FakeDatasetRecords(), Accepting())  # type: ignore[arg-type]
        logs = LogService(self.runs, self.service)
        views = JobViews(self.runs, lambda: self.tracking, self.service)  # type: ignore[arg-type, return-value]
        app = create_app(self.service, datasets, logs, views, current_access, max_body_bytes=10_000)
        root.mount("/post-training", app)
        (self.port,) = free_ports(1)
        self._server = uvicorn.Server(
            uvicorn.Config(root, host="127.0.0.1", port=self.port, log_level="warning")
        )
        self._thread = threading.Thread(target=self._server.run)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/post-training"

    def start(self) -> None:
        self._thread.start()
        wait_until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """A running API; the connection ``post_training_default`` leads to it."""
    server = ApiServer()
    connect(monkeypatch, host=server.url, login="admin", password="right")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Settings, a data set and a trainer, over a fake record."""
    from tests.operators.workplace import Workplace

    return Workplace(tmp_path, monkeypatch)


@pytest.fixture
def stages(tmp_path: Path, mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch) -> StageWorkplace:
    """Settings and a stand-in for the process, over a real MLflow."""
    from tests.operators.stages import StageWorkplace

    return StageWorkplace(tmp_path, mlflow_server, monkeypatch)


def connect(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """Point the connection ``post_training_default`` somewhere."""
    connection = {"conn_type": "post_training", **fields}
    monkeypatch.setenv("AIRFLOW_CONN_POST_TRAINING_DEFAULT", json.dumps(connection))
