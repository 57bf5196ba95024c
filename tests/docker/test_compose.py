"""The compose files against the published schema, and what no schema can say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

HERE = Path(__file__).parent
DOCKER = HERE.parents[1] / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml")
ONCE = {"secrets", "databases", "migrate"}
"""Services that do their work and end."""


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return content


SERVICES = read("compose.yaml")["services"]
GPU = read("compose.gpu.yaml")["services"]


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads((HERE / "compose-spec.json").read_text()))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_the_schema_describes(name: str, schema: jsonschema.Draft7Validator) -> None:
    assert [error.message for error in schema.iter_errors(read(name))] == []


def test_the_schema_refuses_a_field_that_compose_does_not_know(schema: jsonschema.Draft7Validator) -> None:
    broken = read("compose.yaml")
    broken["services"]["redis"]["restarts"] = "always"
    assert not schema.is_valid(broken)


@pytest.mark.parametrize("name", SERVICES)
def test_a_server_restarts_and_is_watched_and_what_is_done_once_is_not(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == ("on-failure" if name in ONCE else "unless-stopped")
    assert ("healthcheck" in service) == (name not in ONCE)


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_waited_for_is_a_service_that_can_come_so_far(name: str) -> None:
    for other, rule in SERVICES[name].get("depends_on", {}).items():
        condition = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert rule["condition"] == condition


def test_every_volume_is_declared_and_used() -> None:
    named = {
        text.partition(":")[0]
        for service in SERVICES.values()
        for text in service.get("volumes", [])
        if not text.startswith("${")
    }
    assert named == read("compose.yaml")["volumes"].keys()


def test_a_reader_of_secrets_sees_its_own_alone() -> None:
    readers = {
        name: [text for text in service.get("volumes", []) if text.startswith("secrets-")]
        for name, service in SERVICES.items()
        if name != "secrets"
    }
    people = "secrets-people:/run/people"
    assert [name for name, volumes in readers.items() if people in volumes] == ["api-server"]
    readers["api-server"].remove(people)
    assert all(len(volumes) <= 1 for volumes in readers.values())
    assert all(text.endswith(":/run/secrets:ro") for volumes in readers.values() for text in volumes)
    assert {name for name, volumes in readers.items() if "secrets-workers:/run/secrets:ro" in volumes} == {
        "worker-default",
        "worker-cpu",
    }


@pytest.mark.parametrize("name", FILES)
def test_no_secret_stands_in_a_file(name: str) -> None:
    for service in read(name)["services"].values():
        for key, value in service.get("environment", {}).items():
            if any(word in key for word in ("PASSWORD", "SECRET_KEY", "SQL_ALCHEMY", "FERNET", "BROKER_URL")):
                assert key.endswith(("_CMD", "_FILE")), key
                assert value.startswith(("cat /run/secrets/", "/run/secrets/", "/run/people/"))


def test_the_api_server_may_write_the_passwords_as_airflow_does() -> None:
    service = SERVICES["api-server"]
    file = Path(service["environment"]["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"])
    (mount,) = [text for text in service["volumes"] if f":{file.parent}" in text]
    assert not mount.endswith(":ro")


def test_ports_are_published_on_loopback_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(":-127.0.0.1:" in port for port in ports)


def test_images_of_others_are_pinned_to_a_release() -> None:
    images = {service["image"] for service in SERVICES.values() if "build" not in service}
    assert images
    for image in images:
        release = image.partition(":")[2].partition("-")[0]
        assert release.count(".") >= 1
        assert release.replace(".", "").isdigit()


def test_each_gpu_has_a_worker_with_one_slot() -> None:
    workers = [service for name, service in GPU.items() if name.startswith("worker-gpu")]
    devices = [one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for one in workers]
    assert devices == [[str(number)] for number in range(8)]
    assert all(one["command"][-1].endswith("--queues gpu --concurrency 1") for one in workers)
    for count in (2, 4, 8):
        taken = [one for one in workers if f"gpus-{count}" in one.get("profiles", [f"gpus-{count}"])]
        assert len(taken) == count
