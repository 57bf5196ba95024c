"""A service's process: what the compose file says of it, in terms of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from cluster.compose import Service
from cluster.hosts import with_addresses
from cluster.images import Start, image_environment, image_paths, search_path, start_of

LOG_SERVERS = {
    "worker": ("AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT", 8793),
    "triggerer": ("AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT", 8794),
}
"""Servers of Airflow that listen on all addresses, by a word of their commands: setting and usual port."""

_FOREIGN = ("AIRFLOW_", "_AIRFLOW", "MLFLOW_", "POSTGRES_", "PG", "RAY_", "REDIS")


@dataclass(frozen=True)
class Replica:
    """One process of a service.

    What a service only reads is the same for all of its replicas; what it writes is each one's own: a replica
    stands for a machine, as one of docker/compose.worker.yaml, which shares no volume with the first one.

    :param number: counted from 1.
    :param address: its own, on loopback.
    :param addresses: of all services.
    :param home: folder of the whole cluster.
    :param log_port: port for a server of Airflow that listens on all addresses.
    """

    service: Service
    number: int
    address: str
    addresses: Mapping[str, str]
    home: Path
    log_port: int

    @property
    def name(self) -> str:
        """The service's name, with the number where there are several."""
        return self.service.name if self.service.replicas == 1 else f"{self.service.name}-{self.number}"

    @property
    def folder(self) -> Path:
        """What a container has of its own."""
        return self.home / "services" / self.name

    @cached_property
    def volumes(self) -> dict[str, Path]:
        """Folders of this machine, by where the service sees them."""
        return {
            mount.target: self._place(mount.source, mount.volume, mount.read_only)
            for mount in self.service.mounts
        }

    def _place(self, source: str, volume: bool, read_only: bool) -> Path:
        if not volume:
            return Path(source)
        own = "" if read_only or self.number == 1 else f"-{self.number}"
        return self.home / "volumes" / f"{source}{own}"

    @cached_property
    def environment(self) -> dict[str, str]:
        """All variables of the process; those of this shell that mean other servers are left out."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        said = {key: self.translated(value) for key, value in self.service.environment.items()}
        own = {"PATH": search_path(), "HOSTNAME": self.address}
        if self.log_server is not None:
            own[self.log_server[0]] = str(self.log_port)
        return inherited | image_environment(self.service.image, self.folder) | said | own

    @cached_property
    def log_server(self) -> tuple[str, int] | None:
        """The setting and the usual port of its server of logs, if it has one."""
        words = " ".join(self.service.command).split()
        return next((found for word, found in LOG_SERVERS.items() if word in words), None)

    def start(self) -> Start:
        """Return what starts it.

        :raises ValueError: if nothing here stands for its image.
        """
        command = [self.translated(word) for word in self.service.command]
        return start_of(self.service.image, command, self.environment, self.volumes)

    def check(self) -> tuple[str, ...]:
        """Return the command that ends without an error if it is well."""
        assert self.service.health is not None  # noqa: S101
        return tuple(map(self.translated, self.service.health.command))

    def make_folders(self) -> None:
        """Make its own folder and its volumes."""
        for folder in (self.folder / "airflow", *self.volumes.values()):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def translated(self, text: str) -> str:
        """Replace names and places that only containers have."""
        text = with_addresses(text, self.addresses).replace("0.0.0.0", self.address)  # noqa: S104
        places = image_paths(self.service.image, self.folder) | self.volumes
        if not places:
            return text
        known = "|".join(map(re.escape, sorted(places, key=len, reverse=True)))
        return re.sub(rf"(?<![\w./-])({known})(?![\w.-])", lambda found: str(places[found[1]]), text)


def replicas_of(
    services: Mapping[str, Service], addresses: list[str], log_ports: list[int], home: Path
) -> list[Replica]:
    """Give every process of every service an address; a service's name is that of its first one."""
    numbered = [
        (service, number) for service in services.values() for number in range(1, service.replicas + 1)
    ]
    given = dict(zip([(service.name, number) for service, number in numbered], addresses, strict=True))
    names = {service.name: given[service.name, 1] for service in services.values() if service.replicas}
    return [
        Replica(service, number, given[service.name, number], names, home, port)
        for (service, number), port in zip(numbered, log_ports, strict=True)
    ]


def scaled(services: Mapping[str, Service], counts: Mapping[str, int]) -> dict[str, Service]:
    """Return the services with other numbers of replicas.

    :raises KeyError: if there is no such service.
    """
    return {**services, **{name: replace(services[name], replicas=count) for name, count in counts.items()}}
