"""What a standalone Airflow and MLflow are told: ports, folders, users, commands, environment."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

LOOPBACK = "127.0.0.1"
_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to connections: a server binds its port long after it was found free."""


MIGRATE = "migrate"
"""What makes or mends Airflow's database, and its keys, before a server starts."""

AIRFLOW_SERVERS = ("api-server", "scheduler", "dag-processor", "triggerer")
SERVERS = (*AIRFLOW_SERVERS, "mlflow")


@dataclass(frozen=True)
class Ports:
    """TCP ports on loopback."""

    airflow: int
    mlflow: int
    worker_logs: int
    triggerer_logs: int


@dataclass(frozen=True)
class Layout:
    """What all servers are told: where things are and who may sign in.

    :param users: Airflow's ``name:role`` pairs, comma separated.
    """

    home: Path
    dags_folder: Path
    allowed_roots: tuple[Path, ...]
    ports: Ports
    users: str = "admin:admin"

    @property
    def airflow_url(self) -> str:
        """Address of Airflow's pages and API."""
        return f"http://{LOOPBACK}:{self.ports.airflow}"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow's pages and API."""
        return f"http://{LOOPBACK}:{self.ports.mlflow}"

    @property
    def service_url(self) -> str:
        """The ``base_url`` of a post-training client."""
        return f"{self.airflow_url}/post-training"

    @property
    def passwords_file(self) -> Path:
        """Where Airflow reads the users' passwords, and never writes any."""
        return self.home / "passwords.json"


def server_command(layout: Layout, name: str) -> list[str]:
    """Return the command of one of ``SERVERS`` or of ``MIGRATE``."""
    if name == MIGRATE:
        return ["airflow", "db", "migrate"]
    if name in AIRFLOW_SERVERS:
        return ["airflow", name]
    home = layout.home / "mlflow"
    command = ["mlflow", "server", "--host", LOOPBACK, "--port", str(layout.ports.mlflow)]
    command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--workers", "1"]
    return [*command, "--artifacts-destination", str(home / "artifacts"), "--serve-artifacts"]


def free_ports(count: int) -> list[int]:
    """Find TCP ports on loopback that nothing listens on, all different.

    :raises RuntimeError: if there are not so many.
    """
    found: list[int] = []
    with ExitStack() as probes:
        for port in SystemRandom().sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                return found
            probe = probes.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind((LOOPBACK, port))
                found.append(port)
    raise RuntimeError(f"there are no {count} free ports from {_PORTS.start} to {_PORTS.stop - 1}")


def is_free(port: int) -> bool:
    """Whether nothing listens on this loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) != 0


def server_environment(
    layout: Layout, passwords: Mapping[str, str], inherited: Mapping[str, str], extra: Mapping[str, str]
) -> dict[str, str]:
    """Build the environment of every server.

    Inherited settings of Airflow and MLflow are left out: a demo must not migrate the
    database that a shell happens to point to.
    """
    ours = {k: v for k, v in inherited.items() if not k.startswith(("AIRFLOW_", "MLFLOW_"))}
    bin_folder = str(Path(sys.executable).parent)
    ours["PATH"] = os.pathsep.join([bin_folder, inherited.get("PATH", os.defpath)])
    return ours | _airflow_settings(layout) | _RECOVERY | _connections(layout, passwords) | dict(extra)


def _airflow_settings(layout: Layout) -> dict[str, str]:
    return {
        "AIRFLOW_HOME": str(layout.home / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(layout.dags_folder),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": layout.users,
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(layout.passwords_file),
        "AIRFLOW__API__HOST": LOOPBACK,
        "AIRFLOW__API__PORT": str(layout.ports.airflow),
        "AIRFLOW__API__BASE_URL": layout.airflow_url,
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        # A file that has changed is parsed at once; by default all others are too, twice a minute.
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "120",
        # On a busy machine a file takes longer than the defaults' 30 and 50 s; one that was given up is next
        # tried after the interval above.
        "AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT": "120",
        "AIRFLOW__DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT": "150",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(layout.ports.worker_logs),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(layout.ports.triggerer_logs),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW__POST_TRAINING__HOME": str(layout.home / "jobs"),
        "AIRFLOW__POST_TRAINING__ALLOWED_ROOTS": ",".join(map(str, layout.allowed_roots)),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight idle processes, over 1 GiB
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40",  # at 15 connections more callers at once stall for a minute
        "PYTHONUNBUFFERED": "1",
    }


_RECOVERY = {
    # A task whose supervisor died is started again after this and the interval of the check; Airflow's own
    # five minutes are for clusters. An api-server must be back within it: heartbeats pass through it.
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    # A task that starts, and each heartbeat, waits a minute for an api-server that starts again, and sees
    # within 5 s that it is back. By default they give up after 15 s of pauses, and a start that gives up is a
    # lost attempt; so is one that a busy server has answered later than the default 5 s, for its repetition
    # is refused.
    "AIRFLOW__WORKERS__EXECUTION_API_RETRIES": "15",
    "AIRFLOW__WORKERS__EXECUTION_API_RETRY_WAIT_MAX": "5",
    "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "30",
    # A scheduler takes over the tasks of one that was silent for so long, and looks for such this often. The
    # defaults, 30 s and 300 s, leave them to nobody for five minutes if the new one starts within the 30 s.
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "20",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "15",
}


def _connections(layout: Layout, passwords: Mapping[str, str]) -> dict[str, str]:
    mlflow = {"conn_type": "mlflow", "host": layout.mlflow_url}
    service = {"conn_type": "post_training", "host": layout.service_url}
    service |= {"login": "admin", "password": passwords["admin"]} if "admin" in passwords else {}
    return {
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(mlflow),
        "AIRFLOW_CONN_POST_TRAINING_DEFAULT": json.dumps(service),
    }
