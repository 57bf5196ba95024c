"""Services of the compose file in terms of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cluster import COMPOSE_FILE
from cluster.compose import Mount, Service, read_services
from cluster.images import ROOT
from cluster.replicas import Replica, replicas_of, scaled


def service(name: str, **fields: object) -> Service:
    return replace(Service(name, "post-training-trainer", ("run",)), **fields)  # type: ignore[arg-type]


def lay_out(home: Path, *services: Service) -> dict[str, Replica]:
    named = {one.name: one for one in services}
    count = sum(one.replicas for one in services)
    addresses, ports = [f"127.9.9.{n}" for n in range(count)], list(range(9000, 9000 + count))
    return {one.name: one for one in replicas_of(named, addresses, ports, home)}


def test_what_is_only_read_is_shared_and_what_is_written_is_each_ones_own(tmp_path: Path) -> None:
    mounts = (
        Mount("secrets", "/run/secrets", volume=True, read_only=True),
        Mount("jobs", "/jobs", volume=True, read_only=False),
        Mount("/srv/data", "/data", volume=False, read_only=False),
    )
    one, two = lay_out(tmp_path, service("worker", mounts=mounts, replicas=2)).values()
    assert (one.name, two.name) == ("worker-1", "worker-2")
    volumes = tmp_path / "volumes"
    shared = {"/run/secrets": volumes / "secrets", "/data": Path("/srv/data")}
    assert one.volumes == {**shared, "/jobs": volumes / "jobs"}
    assert two.volumes == {**shared, "/jobs": volumes / "jobs-2"}


def test_names_and_places_of_containers_are_replaced(tmp_path: Path) -> None:
    mounts = (Mount("data", "/data", volume=True, read_only=False),)
    made = lay_out(tmp_path, service("redis"), service("worker", mounts=mounts))
    worker = made["worker"]
    for text, translated in {
        "redis://:x@redis:6379/0": "redis://:x@127.9.9.0:6379/0",
        "--host 0.0.0.0": "--host 127.9.9.1",
        "/data/a,/data": f"{tmp_path}/volumes/data/a,{tmp_path}/volumes/data",
        "/database /srv/data x/data": "/database /srv/data x/data",
        "/opt/airflow/dags": f"{ROOT}/dags",
        "root=/opt/airflow": f"root={tmp_path}/services/worker/airflow",
        "/opt/init/answers.py": f"{ROOT}/docker/init/answers.py",
    }.items():
        assert worker.translated(text) == translated


def test_an_image_of_others_has_nothing_of_ours(tmp_path: Path) -> None:
    made = lay_out(tmp_path, service("db", image="postgres:15.18"))["db"]
    assert made.translated("/opt/airflow") == "/opt/airflow"
    assert "AIRFLOW_HOME" not in made.environment


def test_variables_of_this_shell_that_mean_other_servers_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AIRFLOW__CORE__EXECUTOR", "MLFLOW_TRACKING_URI", "PGHOST", "RAY_ADDRESS", "REDISCLI_AUTH"):
        monkeypatch.setenv(name, "foreign")
    monkeypatch.setenv("LANG", "C.UTF-8")
    environment = lay_out(tmp_path, service("worker", environment={"A": "0.0.0.0"}))["worker"].environment
    assert "foreign" not in environment.values()
    assert (environment["LANG"], environment["A"]) == ("C.UTF-8", "127.9.9.0")
    assert environment["HOSTNAME"] == "127.9.9.0"


def test_servers_of_logs_have_ports_of_their_own_where_one_machine_has_several(tmp_path: Path) -> None:
    services = scaled(read_services(COMPOSE_FILE, {}), {"worker-cpu": 2})
    made = lay_out(tmp_path, *services.values())
    setting = "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT"
    ports = [made[name].environment[setting] for name in ("worker-cpu-1", "worker-cpu-2", "worker-default")]
    assert len({*ports}) == 3
    assert "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT" in made["triggerer"].environment
    assert setting not in made["api-server"].environment  # it asks for the usual port


def test_nothing_stands_for_an_image_that_is_not_known(tmp_path: Path) -> None:
    made = lay_out(tmp_path, service("proxy", image="nginx:1.29"))["proxy"]
    with pytest.raises(ValueError, match=r"image 'nginx:1\.29'"):
        made.start()
