"""What several suites share: one real MLflow server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlflow_server import MLflowServer

# Airflow reads its home when it is first imported, so before any test module is.
AIRFLOW_HOME = Path(tempfile.mkdtemp(prefix="airflow-tests-"))
for inherited in [name for name in os.environ if name.startswith(("AIRFLOW", "MLFLOW"))]:
    del os.environ[inherited]
os.environ |= {
    "AIRFLOW_HOME": str(AIRFLOW_HOME),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
}


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(AIRFLOW_HOME, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what ``make test`` must leave to one of its workers: a file, and all that use the same servers.

    The system tests come first: they take the longest.
    """
    for item in items:
        system = item.get_closest_marker("system") is not None
        shared = system and "deployment" in getattr(item, "fixturenames", ())
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("system" if shared else file))
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """A running server; a test that stops it starts it again."""
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()
