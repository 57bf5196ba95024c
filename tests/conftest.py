"""What several suites share: one real MLflow server, and which worker runs what."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.mlflow_server import MLflowServer

# Airflow reads its home when it is first imported, so before any test module is.
AIRFLOW_HOME = Path(tempfile.mkdtemp(prefix="airflow-tests-"))
for inherited in [name for name in os.environ if name.startswith(("AIRFLOW", "MLFLOW"))]:
    del os.environ[inherited]
os.environ |= {
    "AIRFLOW_HOME": str(AIRFLOW_HOME),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # its thread changes the environment while others read it
}


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(AIRFLOW_HOME, ignore_errors=True)


SERVERS = {
    "tests/system/test_chaos.py": "their own",
    "tests/system/test_cluster.py": "a cluster",
    "tests/system/test_ray.py": "a Ray cluster",
    **dict.fromkeys(
        (f"tests/system/test_{name}.py" for name in ("outages", "retraining", "search")), "frail"
    ),
}
"""Which servers the system tests use that leave those of all others, ``deployment``, alone."""


class Together(LoadScopeScheduling):
    """Leaves to one of the workers of ``make test`` a whole file, and all files that use the same servers.

    pytest-xdist has groups for that, which pytest 9.2 does not notice (pytest-xdist's issue 1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return SERVERS.get(file, "deployment") if file.startswith("tests/system/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    """Let ``Together`` distribute the tests."""
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the system tests come first: they take the longest."""
    items.sort(key=lambda item: item.get_closest_marker("system") is None)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """A running server; a test that stops it starts it again."""
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()
