"""The app over fakes, and who calls it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytest
from fastapi import FastAPI, HTTPException, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.testclient import TestClient

from post_training.api.app import create_app
from post_training.dataset_registry import DatasetService
from post_training.job_views import JobViews
from post_training.jobs import JobService
from post_training.logs import LogService
from tests.fakes import FakeAccess, FakeDatasetRecords, FakeReader, FakeRuns, FakeTracking
from tests.test_datasets import resolver_of
from tests.test_jobs import Accepting

PREFIXES = ("/v1/post-training", "/v1alpha/post-training")
LIMIT = 20_000


class Deployment:
    """The app over fakes; a token says who calls."""

    def __init__(self) -> None:
        self.runs, self.tracking, self.resolver = FakeRuns(), FakeTracking(), Accepting()
        self.service = JobService(self.runs, lambda: self.tracking, self.resolver)  # type: ignore[arg-type, return-value]
        self.records = FakeDatasetRecords()
        self.datasets = DatasetService(self.records, resolver_of(Path("/allowed")))  # type: ignore[arg-type]
        self.logs = LogService(self.runs, self.service)
        self.views = JobViews(self.runs, lambda: self.tracking, self.service, FakeReader)  # type: ignore[arg-type, return-value]
        self.callers = {
            "admin": FakeAccess("admin"),
            "viewer": FakeAccess("viewer", trigger=False, cancel=False),
            "stranger": FakeAccess("stranger", read=False, trigger=False, cancel=False),
        }

        async def current_access(
            token: HTTPAuthorizationCredentials = Security(HTTPBearer()),
        ) -> FakeAccess:
            caller = self.callers.get(token.credentials)
            if caller is None:
                raise HTTPException(401, "Not authenticated")
            return caller

        self.current_access = current_access

    @cached_property
    def app(self) -> FastAPI:
        return create_app(
            self.service,
            self.datasets,
            self.logs,
            self.views,
            self.current_access,
            max_body_bytes=LIMIT,
        )

    def client(self, caller: str = "admin") -> TestClient:
        return TestClient(
            self.app, headers={"Authorization": f"Bearer {caller}"}, raise_server_exceptions=False
        )


@pytest.fixture
def deployment() -> Deployment:
    return Deployment()


@pytest.fixture
def client(deployment: Deployment) -> TestClient:
    return deployment.client()
