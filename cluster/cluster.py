"""Starts, watches and ends the processes of a compose file's services."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import httpx

from cluster.compose import COMPLETED, HEALTHY, Service, read_services
from cluster.hosts import Forwarder, free_network
from cluster.images import ROOT, missing_packages
from cluster.replicas import Replica, replicas_of, scaled
from post_training.standalone_layout import free_ports
from post_training.standalone_servers import ServerProcesses, write_private

COMPOSE_FILE = ROOT / "docker" / "compose.yaml"
SERVERS_FILE = "servers.json"
PORTS = (5000, 5432, 6379, 8080, 8793, 8794)
"""What the services listen on."""

_PAUSE = 0.25


@dataclass
class Check:
    """Whether a replica was found well, and the check that runs, or the time of the next one."""

    well: bool = False
    running: subprocess.Popen[bytes] | None = None
    due: float = 0.0
    ends: float = 0.0

    def kill(self) -> None:
        """Kill the check that runs, and what it has started, if there is one."""
        if self.running is not None and self.running.poll() is None:
            os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()


class Cluster:
    """The services of ``docker/compose.yaml``; ``with`` starts and stops them.

    :param home: holds volumes, logs and secrets; kept after ``stop``.
    :param variables: of the compose file. ``AIRFLOW_URL`` and ``MLFLOW_URL`` are set here.
    :param scale: numbers of replicas, by service.
    :param timeout: seconds in which ``start`` must succeed.
    """

    def __init__(
        self,
        home: Path,
        *,
        variables: Mapping[str, str] | None = None,
        scale: Mapping[str, int] | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.home = home.resolve()
        self._timeout = timeout
        self._servers = ServerProcesses(self.home)
        self.replicas = {one.name: one for one in _lay_out(self.home, variables or {}, scale or {})}
        self._started: list[str] = []
        self._checks = {name: Check() for name in self.replicas}
        self._forwarder = Forwarder(
            {
                (one.address, one.log_server[1]): one.log_port
                for one in self.replicas.values()
                if one.log_server is not None
            }
        )

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def airflow_url(self) -> str:
        """Address of Airflow's pages and API."""
        return f"http://{self.replicas['api-server'].address}:8080"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow's pages and API."""
        return f"http://{self.replicas['mlflow'].address}:5000"

    @property
    def service_url(self) -> str:
        """The ``base_url`` of a post-training client."""
        return f"{self.airflow_url}/post-training"

    def token(self, user: str = "admin") -> str:
        """Sign in to Airflow and return a bearer token.

        :raises httpx.HTTPError: if Airflow does not answer or refuses.
        """
        passwords = json.loads(self.secret("people", "passwords.json"))
        login = {"username": user, "password": passwords[user]}
        answer = httpx.post(f"{self.airflow_url}/auth/token", json=login, timeout=120)
        return str(answer.raise_for_status().json()["access_token"])

    def secret(self, reader: str, name: str) -> str:
        """Return a secret that was made for one of the readers, as the service ``secrets`` calls them."""
        return (self.home / "volumes" / f"secrets-{reader}" / name).read_text()

    def start(self) -> Cluster:
        """Start all services in their order, and wait until each is well or has done its work.

        :raises RuntimeError: if a program is missing, they run already under this home, one ends before its
            time (with the end of its log), or time runs out. Whatever was started is stopped again.
        """
        if missing := missing_packages():
            raise RuntimeError(f"install Debian's packages {' '.join(missing)} first")
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._adopted():
            raise RuntimeError(f"a cluster is running under {self.home}: stop it first")
        try:
            self._forwarder.start()
            self._wait_for(list(self.replicas))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all services, those first that need others, whoever started them. May be repeated.

        :raises RuntimeError: if a process cannot be killed.
        """
        self._adopted()
        for check in self._checks.values():
            check.kill()
        for names in reversed(list(self._layers())):
            self._servers.end(names)
        self._forwarder.stop()
        (self.home / SERVERS_FILE).unlink(missing_ok=True)

    def kill(self, name: str) -> None:
        """Send SIGKILL to a replica and to all that it has started, as when its machine is lost for good."""
        self._started.remove(name)
        self._servers.kill(name, session=True)

    def start_again(self, name: str) -> None:
        """Start a replica that was killed, and wait until it is well.

        :raises RuntimeError: as ``start``.
        """
        self._checks[name] = Check()
        self._wait_for([name])

    def mend(self) -> list[str]:
        """Start again what has ended and is to run always; return its names."""
        ended = [
            name
            for name in self._started
            if self.replicas[name].service.restarts and self._servers.exit_code(name) is not None
        ]
        for name in ended:
            self._spawn(self.replicas[name])
        return ended

    def _wait_for(self, names: Sequence[str]) -> None:
        """Start what does not run yet, and wait until these are well or have done their work.

        :raises RuntimeError: as ``start``.
        """
        deadline = monotonic() + self._timeout
        while waiting := [name for name in names if not self._has_come_up(name)]:
            self._start_what_can()
            self._refuse_the_dead()
            if monotonic() > deadline:
                tail = self._servers.log_tail(waiting[0]) if waiting[0] in self._started else ""
                raise RuntimeError(f"not well in {self._timeout:g} s: {', '.join(waiting)}\n{tail}")
            sleep(_PAUSE)

    def _start_what_can(self) -> None:
        for replica in self.replicas.values():
            if replica.name not in self._started and self._may_start(replica.service):
                self._spawn(replica)
                self._started.append(replica.name)

    def _may_start(self, service: Service) -> bool:
        """Whether all that it depends on has come so far."""
        return all(
            self._has_come_up(name) if condition in (COMPLETED, HEALTHY) else name in self._started
            for other, condition in service.depends_on.items()
            for name, replica in self.replicas.items()
            if replica.service.name == other
        )

    def _has_come_up(self, name: str) -> bool:
        """Whether a replica is well; without a check, whether it runs or, if it is not to run, has ended."""
        replica = self.replicas[name]
        if name not in self._started:
            return False
        if not replica.service.restarts:
            return self._servers.exit_code(name) == 0
        check = self._checks[name]
        if replica.service.health is not None and not check.well:
            self._go_on(replica, check)
            return check.well
        return True

    def _go_on(self, replica: Replica, check: Check) -> None:
        """Start a check that is due, or see how the running one ends."""
        health = replica.service.health
        assert health is not None  # noqa: S101
        now = monotonic()
        if check.running is None:
            if now >= check.due:
                with (replica.folder / "health.log").open("wb") as log:
                    command, env = replica.check(), replica.environment
                    check.running = subprocess.Popen(  # noqa: S603
                        command, env=env, stdout=log, stderr=log, start_new_session=True
                    )
                check.ends = now + health.timeout
            return
        if check.running.poll() is None:
            if now < check.ends:
                return
            check.kill()
        check.well = check.running.wait() == 0
        check.running, check.due = None, now + health.interval

    def _refuse_the_dead(self) -> None:
        for name in self._started:
            code = self._servers.exit_code(name)
            if code is not None and (code or self.replicas[name].service.restarts):
                raise RuntimeError(f"{name} ended while starting:\n{self._servers.log_tail(name)}")

    def _spawn(self, replica: Replica) -> None:
        replica.make_folders()
        start = replica.start()
        for command in start.prepare:
            done = subprocess.run(  # noqa: S603
                command, env=replica.environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{replica.name} could not be made ready: {done.stderr}")
        self._servers.spawn(replica.name, start.command, replica.environment)
        write_private(self.home / SERVERS_FILE, {"sessions": self._servers.written()})

    def _layers(self) -> Iterator[list[str]]:
        """Yield the names of replicas such that each comes after all that its service depends on."""
        left, known = dict(self.replicas), set[str]()
        while left:
            layer = [name for name, one in left.items() if known.issuperset(one.service.depends_on)]
            yield layer
            known |= {left.pop(name).service.name for name in layer}

    def _adopted(self) -> bool:
        """Know what another process has started here; return whether any of it runs."""
        with suppress(FileNotFoundError):
            self._servers.adopt(json.loads((self.home / SERVERS_FILE).read_text())["sessions"])
        return self._servers.alive()


def _lay_out(home: Path, variables: Mapping[str, str], scale: Mapping[str, int]) -> list[Replica]:
    """Give every service its processes, addresses and folders."""
    services = scaled(read_services(COMPOSE_FILE, variables), scale)
    count = sum(service.replicas for service in services.values())
    addresses, log_ports = free_network(PORTS, count), free_ports(count)
    plan = {one.service.name: one for one in replicas_of(services, addresses, log_ports, home)}
    urls = {
        "AIRFLOW_URL": f"http://{plan['api-server'].address}:8080",
        "MLFLOW_URL": f"http://{plan['mlflow'].address}:5000",
    }
    services = scaled(read_services(COMPOSE_FILE, {**variables, **urls}), scale)
    return replicas_of(services, addresses, log_ports, home)
