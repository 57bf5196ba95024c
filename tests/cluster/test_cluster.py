"""Starting, mending and ending of services: real processes, that only sleep."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cluster import cluster
from cluster.cluster import Cluster
from tests.waiting import wait_until

COMPOSE = """
services:
  first:
    image: post-training-airflow
    command: [sh, -c, echo first > /shared/order]
    volumes: [shared:/shared]
    restart: on-failure
  mlflow:
    image: post-training-airflow
    command: [sh, -c, echo mlflow >> /shared/order; touch /shared/ready; exec sleep 600]
    volumes: [shared:/shared]
    restart: unless-stopped
    healthcheck: {test: [CMD-SHELL, test -e /shared/ready], interval: 1s, timeout: 10s}
    depends_on: {first: {condition: service_completed_successfully}}
  api-server:
    image: post-training-airflow
    command: [sh, -c, echo $$OWN >> /shared/order; exec sleep 600]
    environment: {OWN: api at 0.0.0.0}
    volumes: [shared:/shared]
    restart: unless-stopped
    depends_on: {mlflow: {condition: service_healthy}}
"""
"""Each notes that it runs; what comes too early stands before what it needs."""


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compose file."""
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE)
    monkeypatch.setattr(cluster, "COMPOSE_FILE", file)
    monkeypatch.setattr(cluster, "missing_packages", list)
    return file


@pytest.mark.usefixtures("services")
def test_services_start_in_their_order_and_end_together(tmp_path: Path) -> None:
    made = Cluster(tmp_path / "home")
    with made:
        order = (made.home / "volumes" / "shared" / "order").read_text().splitlines()
        assert order == ["first", "mlflow", f"api at {made.replicas['api-server'].address}"]
        with pytest.raises(RuntimeError, match="a cluster is running under"):
            Cluster(tmp_path / "home").start()
        pids = _pids(made)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


@pytest.mark.usefixtures("services")
def test_a_server_that_ends_is_started_again_and_what_is_done_is_not(tmp_path: Path) -> None:
    with Cluster(tmp_path / "home") as made:
        assert made.mend() == []
        os.kill(_pids(made)["api-server"], signal.SIGKILL)
        assert wait_until(made.mend) == ["api-server"]
        assert made.mend() == []
        made.kill("api-server")  # as a machine that is lost
        assert made.mend() == []
        made.start_again("api-server")
        assert _pids(made)


@pytest.mark.usefixtures("services")
def test_another_process_ends_what_was_left(tmp_path: Path) -> None:
    left = Cluster(tmp_path / "home").start()
    pids = _pids(left)
    Cluster(tmp_path / "home").stop()
    for pid in pids.values():  # ours, so that nobody else collects them
        os.waitpid(pid, 0)
    left.stop()


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("echo mlflow >>", "echo no disk; exit 3; echo", r"mlflow ended while starting:\nno disk"),
        ("echo first >", "echo no key; exit 1; echo", r"first ended while starting:\nno key"),
        ("touch", "true", r"not well in 6 s: mlflow, api-server"),
    ],
)
def test_what_does_not_come_up_is_said_and_all_is_stopped(
    tmp_path: Path, services: Path, before: str, after: str, error: str
) -> None:
    services.write_text(COMPOSE.replace(before, after))
    with pytest.raises(RuntimeError, match=error):
        Cluster(tmp_path / "home", timeout=6 if "not well" in error else 600).start()
    assert not (tmp_path / "home" / "servers.json").exists()


def _pids(made: Cluster) -> dict[str, int]:
    """The processes that run, by their services."""
    written = made._servers.written()
    found = {name: written[name][-1]["pid"] for name in ("mlflow", "api-server")}
    for pid in found.values():
        os.kill(pid, 0)
    return found
