"""Airflow and MLflow as child processes on loopback, for a demo and for tests.

``python -m post_training.standalone start --home FOLDER --dags-folder DAGS`` starts both and
leaves them running; ``stop --home FOLDER`` ends them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic, sleep

import httpx

from post_training.processes import SessionRecord, end_session, session_alive
from post_training.standalone_layout import LOOPBACK, Layout, Ports, free_ports, server_environment

DAG_IDS = ("supervised_fine_tune", "preference_optimize")
SERVERS_FILE = "servers.json"
_AIRFLOW_HEALTH = "/api/v2/monitor/health"
_LOG_TAIL_LINES = 40


class Standalone:
    """Both servers of one home folder; ``with`` starts and stops them.

    :param home: holds databases, artifacts, logs, passwords and jobs; kept after ``stop``.
    :param airflow_port: None picks a free one; so for ``mlflow_port``.
    :param allowed_roots: folders from which requests may read data and models.
    :param dag_ids: ``start`` waits for these DAGs and switches them on; others stay paused.
    :param users: Airflow's ``name:role`` pairs, comma separated; ``admin`` must be among them.
    :param extra_env: environment of both servers, above everything set here.
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
        self._children: dict[str, subprocess.Popen[bytes]] = {}

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
            airflow_port=state["airflow"]["port"],
            mlflow_port=state["mlflow"]["port"],
            users=state["users"],
        )
        if not any(session_alive(session) for session in found._sessions()):
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
        """Start both servers and wait until they answer and know the DAGs.

        :raises RuntimeError: if they run already under this home, one dies (with the end of
            its log), or time runs out. Whatever was started is stopped again.
        """
        home = self.layout.home
        if any(session_alive(session) for session in self._sessions()):
            raise RuntimeError(f"servers are running under {home}: stop them first")
        for folder in ("airflow", "mlflow", "jobs"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        env = server_environment(self.layout, self._passwords(), os.environ, self._extra_env)
        try:
            for name, command in self._commands().items():
                self._children[name] = self._spawn(name, command, env)
                self._write_state()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End both servers and all that they started, whoever started them. May be repeated.

        :raises RuntimeError: if a process cannot be killed.
        """
        running = [child.pid for child in self._children.values() if child.poll() is None]
        for session in self._sessions() or [SessionRecord.of(pid, self.layout.home) for pid in running]:
            end_session(session)
        for child in self._children.values():
            child.wait()
        self._children.clear()
        (self.layout.home / SERVERS_FILE).unlink(missing_ok=True)

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
        answer = httpx.post(f"{self.airflow_url}/auth/token", json=body, timeout=30)
        return str(answer.raise_for_status().json()["access_token"])

    def _commands(self) -> dict[str, list[str]]:
        home = self.layout.home / "mlflow"
        mlflow = ["mlflow", "server", "--host", LOOPBACK, "--port", str(self.layout.ports.mlflow)]
        mlflow += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--workers", "1"]
        mlflow += ["--artifacts-destination", str(home / "artifacts"), "--serve-artifacts"]
        return {"airflow": ["airflow", "standalone"], "mlflow": mlflow}

    def _spawn(self, name: str, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        program = shutil.which(command[0], path=env["PATH"])
        if program is None:
            raise RuntimeError(f"{command[0]} is not installed beside {sys.executable}")
        with self._log_file(name).open("wb") as log:
            return subprocess.Popen(  # noqa: S603
                [program, *command[1:]],
                env=env,
                cwd=self.layout.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        deadline = monotonic() + self._timeout
        self._wait_for("mlflow", lambda: _healthy(f"{self.mlflow_url}/health"), deadline)
        self._wait_for("airflow", lambda: _healthy(f"{self.airflow_url}{_AIRFLOW_HEALTH}"), deadline)
        headers = {"Authorization": f"Bearer {self.token()}"}
        with httpx.Client(base_url=f"{self.airflow_url}/api/v2", headers=headers, timeout=30) as api:
            waiting = set(self._dag_ids)

            def all_on() -> bool:
                waiting.difference_update({dag_id for dag_id in waiting if _switch_on(api, dag_id)})
                return not waiting

            self._wait_for("airflow", all_on, deadline)

    def _wait_for(self, name: str, condition: Callable[[], bool], deadline: float) -> None:
        while not condition():
            for child_name, child in self._children.items():
                if child.poll() is not None:
                    raise RuntimeError(f"{child_name} ended while starting:\n{self._log_tail(child_name)}")
            if monotonic() > deadline:
                raise RuntimeError(f"{name} was not ready in {self._timeout:g} s:\n{self._log_tail(name)}")
            sleep(0.25)

    def _sessions(self) -> list[SessionRecord]:
        """What is written down; Airflow first, so that its tasks can still reach MLflow."""
        try:
            state = json.loads((self.layout.home / SERVERS_FILE).read_text())
        except FileNotFoundError:
            return []
        servers = [state[name] for name in ("airflow", "mlflow")]
        return [SessionRecord(**server["session"]) for server in servers if server["session"]]

    def _write_state(self) -> None:
        state: dict[str, object] = {
            "dags_folder": str(self.layout.dags_folder),
            "allowed_roots": [str(root) for root in self.layout.allowed_roots],
            "users": self.layout.users,
        }
        addresses = {"airflow": self.airflow_url, "mlflow": self.mlflow_url}
        for name, url in addresses.items():
            child = self._children.get(name)
            session = asdict(SessionRecord.of(child.pid, self.layout.home)) if child else None
            port = getattr(self.layout.ports, name)
            state[name] = {"port": port, "url": url, "log": str(self._log_file(name)), "session": session}
        _write_private(self.layout.home / SERVERS_FILE, state)

    def _passwords(self) -> dict[str, str]:
        file = self.layout.passwords_file
        known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        names = [pair.partition(":")[0] for pair in self.layout.users.split(",")]
        new = {name: secrets.token_urlsafe(18) for name in names if name not in known}
        if new:
            self.layout.home.mkdir(parents=True, exist_ok=True)
            _write_private(file, known | new)
        return known | new

    def _log_file(self, name: str) -> Path:
        return self.layout.home / f"{name}.log"

    def _log_tail(self, name: str) -> str:
        lines = self._log_file(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


def _write_private(file: Path, content: Mapping[str, object]) -> None:
    draft = file.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(file)


def _healthy(url: str) -> bool:
    """Whether the server answers, and every component that it lists is well."""
    try:
        answer = httpx.get(url, timeout=5)
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
    """Start both servers and leave them, or stop them."""
    parser = argparse.ArgumentParser(prog="python -m post_training.standalone", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start both servers and leave them running")
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
