"""The compose files against the published schema, and what no schema can say of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

HERE = Path(__file__).parent
DOCKER = HERE.parents[1] / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml", "compose.private.yaml", "compose.worker.yaml")
EXECUTION_API = "AIRFLOW__CORE__EXECUTION_API_SERVER_URL"
ONCE = {"secrets", "databases", "migrate"}
"""Services that do their work and end."""


class Compose(yaml.SafeLoader):
    """Reads Compose's own tag too: ``!reset`` takes away what another file says, as nothing does here."""


Compose.add_constructor("!reset", lambda loader, node: {})


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load((DOCKER / name).read_text(), Compose)
    return content


def extended(service: dict[str, Any]) -> dict[str, Any]:
    """A service with what it extends, by Compose's rules of merging, as far as our files need them."""
    own = dict(service)
    rule = own.pop("extends", None)
    if rule is None:
        return own
    base = extended(read(rule["file"])["services"][rule["service"]])
    return base | {key: merged(key, base.get(key), value) for key, value in own.items()}


def merged(key: str, base: Any, own: Any) -> Any:
    """One field: a mapping is merged, a list grows, but volumes are told apart by where they are mounted."""
    if not base or not own or key in ("command", "test"):
        return own
    if isinstance(own, dict):
        return base | {name: merged(name, base.get(name), value) for name, value in own.items()}
    if key == "volumes":
        return list({target(text): text for text in [*base, *own]}.values())
    return [*base, *own] if isinstance(own, list) else own


def target(volume: str) -> str:
    """Where a volume is mounted; a source may hold ``${NAME:-default}``."""
    return volume.removesuffix(":ro").rpartition(":")[2]


SERVICES = read("compose.yaml")["services"]
GPU = read("compose.gpu.yaml")["services"]
WORKERS = {name: extended(service) for name, service in read("compose.worker.yaml")["services"].items()}


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
            if any(
                word in key
                for word in (
                    "PASSWORD",
                    "SECRET_KEY",
                    "SQL_ALCHEMY",
                    "FERNET",
                    "BROKER_URL",
                    "TOKEN",
                    "STORAGE",
                    "JWT",
                )
            ):
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


def test_what_other_machines_call_is_published_on_the_address_that_is_named() -> None:
    published = {name: service["ports"] for name, service in read("compose.private.yaml")["services"].items()}
    assert published.keys() == WORKERS["worker-cpu"]["extra_hosts"].keys()
    for (port,) in published.values():
        assert re.fullmatch(r"\$\{PRIVATE_ADDRESS(:\?[^}]+)?\}:(\d+):\2", port)
    called = {f"{name}:{port.rpartition(':')[2]}" for name, (port,) in published.items()}
    addresses = SERVICES["secrets"]["environment"]
    assert called == {addresses["BROKER"], addresses["AIRFLOW_DATABASE"], "api-server:8080", "mlflow:5000"}
    assert "//api-server:8080/" in SERVICES["worker-cpu"]["environment"][EXECUTION_API]
    assert addresses["MLFLOW_URL"] == "http://mlflow:5000"


@pytest.mark.parametrize("name", WORKERS)
def test_a_further_machine_runs_what_the_first_one_runs_and_nothing_that_it_depends_on(
    name: str, schema: jsonschema.Draft7Validator
) -> None:
    service = WORKERS[name]
    assert [error.message for error in schema.iter_errors({"services": {name: service}})] == []
    assert not service["depends_on"]
    first = {**SERVICES, **{key: extended(one) for key, one in GPU.items()}}.get(name, SERVICES["worker-cpu"])
    assert service["environment"] == first["environment"]
    assert {*map(target, service["volumes"])} == {*map(target, first["volumes"])}
    assert service["hostname"].startswith("${WORKER_HOST:?")
    assert service["deploy"]["replicas"] == 1
    secrets = [text for text in service["volumes"] if target(text) == "/run/secrets"]
    assert secrets == ["${SECRETS:-./secrets}:/run/secrets:ro"]
    if name.startswith("worker-gpu"):
        assert service["deploy"] == first["deploy"]
    if name != "logs":
        assert (service["command"], service["healthcheck"]) == (first["command"], first["healthcheck"])


def test_the_workers_of_a_machine_have_names_of_their_own_and_one_server_of_logs() -> None:
    workers = {name: service for name, service in WORKERS.items() if name != "logs"}
    names = [service["environment"]["WORKER"] for service in workers.values()]
    assert len({*names}) == len(names) == 9
    for service in [*workers.values(), SERVICES["worker-default"], SERVICES["worker-cpu"]]:
        assert " --celery-hostname $$WORKER@$$HOSTNAME " in service["command"][-1]
        assert '--destination "$$WORKER@$$HOSTNAME"' in service["healthcheck"]["test"][-1]
    assert SERVICES["worker-default"]["environment"]["WORKER"] not in names
    assert [name for name, service in WORKERS.items() if "ports" in service] == ["logs"]
    assert WORKERS["logs"]["ports"][0].endswith(":8793:8793")
    assert "profiles" not in WORKERS["logs"]


def test_a_profile_names_the_workers_of_a_further_machine() -> None:
    for profile, count in {"cpu": 1, "gpus-1": 1, "gpus-2": 2, "gpus-4": 4, "gpus-8": 8}.items():
        assert sum(profile in service.get("profiles", []) for service in WORKERS.values()) == count


def test_light_tasks_find_a_slot_beside_jobs_that_wait() -> None:
    settings = SERVICES["scheduler"]["environment"]
    slots = settings["AIRFLOW__CORE__DEFAULT_POOL_TASK_SLOT_COUNT"]
    assert slots == settings["AIRFLOW__CORE__PARALLELISM"]
    assert SERVICES["migrate"]["environment"] == settings  # which makes the pool


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
