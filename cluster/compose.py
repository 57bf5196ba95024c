"""What a compose file says about its services, as far as plain processes can do it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HEALTHY, COMPLETED, STARTED = "service_healthy", "service_completed_successfully", "service_started"

OF_CONTAINERS = frozenset(
    {
        "build",
        "cap_drop",
        "init",
        "logging",
        "network_mode",
        "ports",
        "security_opt",
        "shm_size",
        "stop_grace_period",
    }
)
"""Fields that mean something where there are containers, and nothing to a process."""

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<rule>:?-)(?P<default>[^}]*))?\})")


@dataclass(frozen=True)
class Mount:
    """A folder that a service sees in another place.

    :param source: a volume's name, or a folder of the machine.
    :param target: where the service sees it.
    :param volume: whether ``source`` is a volume's name.
    :param read_only: a container cannot write there; a process can, so that nothing here sees it try.
    """

    source: str
    target: str
    volume: bool
    read_only: bool


@dataclass(frozen=True)
class Health:
    """How a service is asked whether it is well.

    :param interval: seconds between two checks while it starts.
    :param timeout: seconds in which a check must end.
    """

    command: tuple[str, ...]
    interval: float
    timeout: float


@dataclass(frozen=True)
class Service:
    """One service.

    :param depends_on: what must hold of other services before this one starts, by their names.
    :param restarts: whether it is started again when it ends.
    :param replicas: how many of it run.
    """

    name: str
    image: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    depends_on: Mapping[str, str] = field(default_factory=dict)
    health: Health | None = None
    restarts: bool = False
    replicas: int = 1


def read_services(file: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """Read the services of a compose file, with its variables replaced.

    :param variables: values of ``${NAME}``; those that it lacks have their defaults.
    :raises ValueError: naming the service and the field that a process cannot follow.
    """
    content = yaml.safe_load(file.read_text())
    return {
        name: _service(name, interpolated(body, variables), file.parent)
        for name, body in content["services"].items()
    }


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """Replace ``${NAME}``, ``${NAME-default}``, ``${NAME:-default}`` and ``$$`` in all texts.

    :raises ValueError: if a variable has neither a value nor a default, or another ``$`` is left.
    """
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    if "$" in _VARIABLE.sub("", value):
        raise ValueError(f"a $ must be $$, ${{NAME}} or ${{NAME:-default}}, got {value!r}")
    return _VARIABLE.sub(lambda found: _replacement(found, variables), value)


def _replacement(found: re.Match[str], variables: Mapping[str, str]) -> str:
    if found["dollar"]:
        return "$"
    value = variables.get(found["name"])
    if value is None or (found["rule"] == ":-" and not value):
        value = found["default"]
    if value is None:
        raise ValueError(f"${{{found['name']}}} has no value and no default")
    return value


def seconds(duration: str) -> float:
    """Read a duration as ``1m30s``.

    :raises ValueError: if it is none.
    """
    parts = re.findall(r"(\d+)(ms|s|m|h)", duration)
    if not parts or "".join(map("".join, parts)) != duration:
        raise ValueError(f"a duration must be as 1m30s, got {duration!r}")
    return sum(int(count) * _UNITS[unit] for count, unit in parts)


def _service(name: str, body: dict[str, Any], folder: Path) -> Service:
    body = {key: value for key, value in body.items() if key not in OF_CONTAINERS}
    restart, deploy = body.pop("restart", "no"), body.pop("deploy", {})
    service = Service(
        name=name,
        image=body.pop("image"),
        command=tuple(body.pop("command")),
        environment={key: str(value) for key, value in body.pop("environment", {}).items()},
        mounts=tuple(_mount(text, folder) for text in body.pop("volumes", [])),
        depends_on={other: rule["condition"] for other, rule in body.pop("depends_on", {}).items()},
        health=_health(body.pop("healthcheck", None)),
        restarts=restart == "unless-stopped",
        replicas=int(deploy.pop("replicas", 1)),
    )
    if unknown := {*body, *(f"deploy.{key}" for key in deploy)}:
        raise ValueError(f"service {name}: a process cannot follow {', '.join(sorted(unknown))}")
    return service


def _mount(text: str, folder: Path) -> Mount:
    source, target, *mode = text.split(":")
    volume = not source.startswith((".", "/"))
    return Mount(source if volume else str((folder / source).resolve()), target, volume, mode == ["ro"])


def _health(check: Mapping[str, Any] | None) -> Health | None:
    if check is None:
        return None
    kind, *words = check["test"]
    command = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
    interval = check.get("start_interval", check["interval"])
    return Health(tuple(command), seconds(interval), seconds(check["timeout"]))
