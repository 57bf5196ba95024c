"""What several suites share: one real MLflow server, and which worker runs what."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
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
    "tests/system/test_ray.py": "those of a Ray cluster",
    **dict.fromkeys(
        (f"tests/system/test_{name}.py" for name in ("outages", "retraining", "search")), "frail"
    ),
}
"""Which servers the system tests use that leave those of all others, ``deployment``, alone."""
LOG_LINES = 40

STRICT = Path(__file__).parent / "lightning_modules"
"""Where warnings are errors, also those of memory that is collected."""


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


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Collect what libraries leave open in other tests before those of the trainer, which it would fail."""
    before, after = (one is not None and one.path.is_relative_to(STRICT) for one in (item, nextitem))
    if after and not before:
        gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a test fails, show the ends of the logs of the standalone servers that it uses."""
    report = yield
    if report.failed:
        homes = {_home_of_servers(used) for used in getattr(item, "funcargs", {}).values()}
        for log in sorted(log for home in homes if home for log in home.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            report.sections.append((f"end of {log.name}", "\n".join(lines[-LOG_LINES:])))
    return report


def _home_of_servers(used: Any) -> Path | None:
    """Return the home folder of a ``Deployment``'s servers, or of those of a test that starts its own."""
    if isinstance(used, Path):
        return used / "home"
    home = getattr(getattr(getattr(used, "servers", None), "layout", None), "home", None)
    return home if isinstance(home, Path) else None


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """A running server; a test that stops it starts it again."""
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()
