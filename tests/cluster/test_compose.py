"""Compose files as plain processes read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.cluster import COMPOSE_FILE
from cluster.compose import Health, Mount, interpolated, read_services, seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${A}", "1"),
        ("${A:-x}", "1"),
        ("${EMPTY:-x}", "x"),
        ("${EMPTY-x}", ""),
        ("${NONE:-http://h:80}", "http://h:80"),
        ("$${A} and ${A}/${A}", "${A} and 1/1"),
        ("plain", "plain"),
    ],
)
def test_variables_are_replaced_as_compose_does(text: str, value: str) -> None:
    assert interpolated({"k": [text]}, {"A": "1", "EMPTY": ""}) == {"k": [value]}


@pytest.mark.parametrize(
    ("text", "error"), [("${NONE}", "NONE.* no value"), ("$A", r"\$ must be"), ("${A:?x}", r"\$ must be")]
)
def test_a_variable_that_cannot_be_replaced_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        interpolated(text, {})


def test_durations() -> None:
    assert [seconds(text) for text in ("2s", "1m30s", "1h", "500ms")] == [2, 90, 3600, 0.5]
    with pytest.raises(ValueError, match="must be as 1m30s, got '5'"):
        seconds("5")


def written(folder: Path, **service: object) -> Path:
    file = folder / "compose.yaml"
    file.write_text(yaml.safe_dump({"services": {"one": {"image": "x:1", "command": ["run"], **service}}}))
    return file


def test_a_service_is_read(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        environment={"N": 1},
        volumes=["kept:/kept", "./here:/there:ro"],
        depends_on={"two": {"condition": "service_healthy"}},
        healthcheck={
            "test": ["CMD-SHELL", "ask $$N"],
            "interval": "30s",
            "timeout": "5s",
            "start_interval": "1s",
        },
        restart="unless-stopped",
        deploy={"replicas": "${COUNT:-2}"},
        cap_drop=["ALL"],
    )
    (service,) = read_services(file, {}).values()
    assert service.environment == {"N": "1"}
    assert service.mounts == (
        Mount("kept", "/kept", volume=True, read_only=False),
        Mount(str(tmp_path / "here"), "/there", volume=False, read_only=True),
    )
    assert service.depends_on == {"two": "service_healthy"}
    assert service.health == Health(("sh", "-c", "ask $N"), 1.0, 5.0)
    assert (service.restarts, service.replicas) == (True, 2)


@pytest.mark.parametrize(
    ("field", "name"), [({"tmpfs": "/x"}, "tmpfs"), ({"deploy": {"mode": "global"}}, "deploy.mode")]
)
def test_what_a_process_cannot_follow_is_refused(tmp_path: Path, field: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"service one: a process cannot follow {name}"):
        read_services(written(tmp_path, **field), {})


def test_our_own_file_can_be_followed() -> None:
    services = read_services(COMPOSE_FILE, {"CPU_WORKERS": "3"})
    assert services["worker-cpu"].replicas == 3
    assert services["migrate"].depends_on == {"databases": "service_completed_successfully"}


@pytest.mark.parametrize("name", ["worker-default", "worker-cpu", "triggerer"])
def test_a_ray_cluster_of_the_shell_reaches_who_submits_its_jobs_and_who_follows_them(name: str) -> None:
    service = read_services(COMPOSE_FILE, {"RAY_ADDRESS": "http://head:8265"})[name]
    assert service.environment["AIRFLOW__POST_TRAINING__RAY_ADDRESS"] == "http://head:8265"
    assert service.environment["AIRFLOW__POST_TRAINING__RAY_TOKEN_CMD"] == "cat /run/secrets/ray_token"
