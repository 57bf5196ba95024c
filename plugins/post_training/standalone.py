"""Airflow's servers and MLflow's as child processes on loopback, for a demo and for tests.

``python -m post_training.standalone start --home FOLDER --dags-folder DAGS`` starts them and
leaves them running; ``stop --home FOLDER`` ends them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic, sleep
from typing import TypeVar

import httpx

from post_training.certificates import certificates
from post_training.standalone_layout import (
    AIRFLOW_SERVERS,
    MIGRATE,
    SERVERS,
    Layout,
    Ports,
    free_ports,
    server_command,
    server_environment,
)
from post_training.standalone_servers import ServerProcesses, write_private

DAG_IDS = (
    "supervised_fine_tune",
    "preference_optimize",
    "supervised_fine_tune_search",
    "preference_optimize_search",
)
SERVERS_FILE = "servers.json"
ANSWER_SECONDS = 120.0
"""How long a server that is just up, on a busy machine, may take to answer."""
_AIRFLOW_HEALTH = "/api/v2/monitor/health"

T = TypeVar("T")


class Standalone:
    """The servers of one home folder; ``with`` starts and stops them.

    :param home: holds databases, artifacts, logs, passwords and jobs; kept after ``stop``.
    :param airflow_port: None picks a free one; so for ``mlflow_port``.
    :param allowed_roots: folders from which requests may read data and models.
    :param dag_ids: ``start`` waits for these DAGs and switches them on; others stay paused.
    :param users: Airflow's ``name:role`` pairs, comma separated; ``admin`` must be among them.
    :param extra_env: environment of all servers, above everything set here.
    :param timeout: seconds in which ``start`` must succeed.
    """

    def __init__(
        self,
        home: Path,
        *,
        dags_folder: Path,
        allowed_roots: Sequence[Path] = (),
        airflow_port: int | None = None,
        mlflow_port: int | None = None,
        dag_ids: Sequence[str] = DAG_IDS,
        users: str = "admin:admin",
        extra_env: Mapping[str, str] | None = None,
        timeout: float = 240.0,
    ) -> None:
        picked = free_ports(4)
        ports = Ports(airflow_port or picked[0], mlflow_port or picked[1], picked[2], picked[3])
        roots = tuple(root.resolve() for root in allowed_roots)
        self.layout = Layout(home.resolve(), dags_folder.resolve(), roots, ports, users)
        self._dag_ids = tuple(dag_ids)
        self._extra_env = dict(extra_env or {})
        self._timeout = timeout
        self._servers = ServerProcesses(self.layout.home)

    @classmethod
    def attach(cls, home: Path) -> Standalone:
        """Find the servers that another process has started.

        :raises FileNotFoundError: if none runs.
        """
        state = json.loads((home / SERVERS_FILE).read_text())
        found = cls(
            home,
            dags_folder=Path(state["dags_folder"]),
            allowed_roots=[Path(root) for root in state["allowed_roots"]],
            dag_ids=state["dag_ids"],
            users=state["users"],
            extra_env=state["extra_env"],
        )
        found.layout = replace(found.layout, ports=Ports(**state["ports"]))
        found._servers.adopt(state["sessions"])
        if not found._servers.alive():
            raise FileNotFoundError(f"no servers run under {home}")
        return found

    def __enter__(self) -> Standalone:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def airflow_url(self) -> str:
        """Address of Airflow's pages and API."""
        return self.layout.airflow_url

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow's pages and API."""
        return self.layout.mlflow_url

    @property
    def service_url(self) -> str:
        """The ``base_url`` of a post-training client."""
        return self.layout.service_url

    def start(self) -> Standalone:
        """Start all servers and wait until they answer and know the DAGs.

        :raises RuntimeError: if they run already under this home, one dies (with the end of
            its log), or time runs out. Whatever was started is stopped again.
        """
        home = self.layout.home
        with suppress(FileNotFoundError):
            Standalone.attach(home)
            raise RuntimeError(f"servers are running under {home}: stop them first")
        for folder in ("airflow", "mlflow", "jobs"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        for name in (MIGRATE, *SERVERS):
            self._servers.log_file(name).unlink(missing_ok=True)
        try:
            self.start_server("mlflow")
            self.start_server(MIGRATE)  # alone: it writes airflow.cfg with the keys that the others share
            deadline = monotonic() + self._timeout
            self._wait_for(MIGRATE, lambda: self._servers.exit_code(MIGRATE) == 0, deadline)
            self._servers.end([MIGRATE])
            for name in AIRFLOW_SERVERS:
                self.start_server(name)
            self._wait_until_ready(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def start_server(self, name: str) -> None:
        """Start one of the servers, again or for the first time, and do not wait for it.

        :raises RuntimeError: if its program is not installed.
        """
        env = server_environment(self.layout, self._passwords(), os.environ, self._extra_env)
        self._servers.spawn(name, server_command(self.layout, name), env)
        self._write_state()

    def kill_server(self, name: str, *, session: bool = False) -> None:
        """Send SIGKILL to one of the servers; ``start_server`` starts it again.

        :param session: whether all that it has started dies with it: a scheduler's tasks and their trainers.
        """
        self._servers.kill(name, session=session)

    def wait_until_ready(self) -> None:
        """Wait until every server answers and knows the DAGs.

        :raises RuntimeError: if one dies (with the end of its log), or time runs out.
        """
        self._wait_until_ready(monotonic() + self._timeout)

    def stop(self) -> None:
        """End all servers and all that they started, whoever started them. May be repeated.

        :raises RuntimeError: if a process cannot be killed.
        """
        file = self.layout.home / SERVERS_FILE
        with suppress(FileNotFoundError):  # another process may have started one of them again
            self._servers.adopt(json.loads(file.read_text())["sessions"])
        # Asked to end, it waits ten seconds for nothing; all that it knows is in the database.
        self._servers.kill("triggerer", session=True)
        self._servers.end((MIGRATE, *AIRFLOW_SERVERS))
        self._servers.end(["mlflow"])  # last, so that tasks that end can still reach it
        file.unlink(missing_ok=True)

    def password(self, user: str = "admin") -> str:
        """The user's password, made once for each home.

        :raises KeyError: for a user that is not in ``users``.
        """
        return self._passwords()[user]

    def token(self, user: str = "admin") -> str:
        """Sign in and return a bearer token.

        :raises httpx.HTTPError: if Airflow does not answer or refuses.
        """
        body = {"username": user, "password": self.password(user)}
        url = f"{self.airflow_url}/auth/token"
        answer = httpx.post(url, json=body, timeout=ANSWER_SECONDS, verify=certificates())
        return str(answer.raise_for_status().json()["access_token"])

    def _wait_until_ready(self, deadline: float) -> None:
        self._wait_for("mlflow", lambda: _healthy(f"{self.mlflow_url}/health"), deadline)
        self._wait_for("api-server", lambda: _healthy(f"{self.airflow_url}{_AIRFLOW_HEALTH}"), deadline)
        token = self._wait_for("api-server", self._signed_in, deadline)
        headers = {"Authorization": f"Bearer {token}"}
        url = f"{self.airflow_url}/api/v2"
        with httpx.Client(
            base_url=url, headers=headers, timeout=ANSWER_SECONDS, verify=certificates()
        ) as api:
            waiting = set(self._dag_ids)

            def all_on() -> bool:
                waiting.difference_update({dag_id for dag_id in waiting if _switch_on(api, dag_id)})
                return not waiting

            self._wait_for("dag-processor", all_on, deadline)

    def _signed_in(self) -> str | None:
        try:
            return self.token()
        except httpx.TransportError:
            return None

    def _wait_for(self, name: str, condition: Callable[[], T | None], deadline: float) -> T:
        while not (found := condition()):
            if died := self._servers.died(may_finish=MIGRATE):
                raise RuntimeError(f"{died} ended while starting:\n{self._servers.log_tail(died)}")
            if monotonic() > deadline:
                raise RuntimeError(
                    f"{name} was not ready in {self._timeout:g} s:\n{self._servers.log_tail(name)}"
                )
            sleep(0.25)
        return found

    def _write_state(self) -> None:
        state: dict[str, object] = {
            "dags_folder": str(self.layout.dags_folder),
            "allowed_roots": [str(root) for root in self.layout.allowed_roots],
            "users": self.layout.users,
            "dag_ids": self._dag_ids,
            "extra_env": self._extra_env,
            "ports": asdict(self.layout.ports),
            "sessions": self._servers.written(),
        }
        write_private(self.layout.home / SERVERS_FILE, state)

    def _passwords(self) -> dict[str, str]:
        file = self.layout.passwords_file
        known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        names = [pair.partition(":")[0] for pair in self.layout.users.split(",")]
        new = {name: secrets.token_urlsafe(18) for name in names if name not in known}
        if new:
            self.layout.home.mkdir(parents=True, exist_ok=True)
            write_private(file, known | new)
        return known | new


def _healthy(url: str) -> bool:
    """Whether the server answers, and every component that it lists is well."""
    try:
        answer = httpx.get(url, timeout=5, verify=certificates())
    except httpx.HTTPError:
        return False
    if not answer.is_success or not answer.headers.get("content-type", "").startswith("application/json"):
        return answer.is_success
    return all(component["status"] == "healthy" for component in answer.json().values())


def _switch_on(api: httpx.Client, dag_id: str) -> bool:
    """Unpause the DAG; False while Airflow does not know it."""
    try:
        return api.patch(f"/dags/{dag_id}", json={"is_paused": False}).is_success
    except httpx.HTTPError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the servers and leave them, or stop them."""
    parser = argparse.ArgumentParser(prog="python -m post_training.standalone", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start the servers and leave them running")
    stop = commands.add_parser("stop", help="end the servers of a home folder")
    for command in (start, stop):
        command.add_argument("--home", type=Path, required=True, help="folder of databases, logs and jobs")
    start.add_argument("--dags-folder", type=Path, required=True)
    start.add_argument("--allowed-root", type=Path, action="append", default=[], help="may be repeated")
    start.add_argument("--airflow-port", type=int)
    start.add_argument("--mlflow-port", type=int)
    options = vars(parser.parse_args(arguments))
    if options.pop("command") == "stop":
        try:
            Standalone.attach(options["home"]).stop()
        except FileNotFoundError:
            print("no servers are running")
        return
    servers = Standalone(allowed_roots=options.pop("allowed_root"), **options).start()
    print(f"Airflow {servers.airflow_url}  user admin  password {servers.password()}")
    print(f"MLflow  {servers.mlflow_url}")


if __name__ == "__main__":
    main()
