"""The commands that start and end a standalone Airflow and MLflow."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from pathlib import Path
from threading import Event

import post_training
from post_training.cli.deployment import find_servers
from post_training.cli.output import console, print_fields, print_json
from post_training.errors import InvalidRequestError, JobConflictError, RecordUnavailableError
from post_training.standalone import Standalone
from post_training.standalone_layout import is_free

AIRFLOW_PORT, MLFLOW_PORT = 8080, 5000
"""Taken where they are free, if no others are asked for."""


def up(
    home: Path,
    *,
    allowed_roots: list[Path],
    airflow_port: int | None,
    mlflow_port: int | None,
    detach: bool,
    as_json: bool,
) -> None:
    """Start both servers, say where they are, and end them at Ctrl-C unless they are left running.

    :param home: holds their databases, logs and jobs; kept when they end.
    :param allowed_roots: folders below which requests may name data and models.
    :param airflow_port: None is 8080, or another where that is taken; so for ``mlflow_port`` and 5000.
    :raises InvalidRequestError: if a folder is none.
    :raises JobConflictError: if a port is taken, or servers run under this home.
    :raises RecordUnavailableError: if they do not start.
    """
    for root in allowed_roots:
        if not root.is_dir():
            raise InvalidRequestError.of("--allowed-root", f"must be a folder, got {str(root)!r}")
    try:
        Standalone.attach(home)
    except FileNotFoundError:
        servers = Standalone(
            home,
            dags_folder=dags_folder(),
            allowed_roots=allowed_roots,
            airflow_port=_port("--airflow-port", airflow_port, AIRFLOW_PORT),
            mlflow_port=_port("--mlflow-port", mlflow_port, MLFLOW_PORT),
        )
    else:
        raise JobConflictError(f"servers run under {home} already: `post-training down` ends them")
    _until_interrupted(servers, detach=detach, as_json=as_json)


def _until_interrupted(servers: Standalone, *, detach: bool, as_json: bool) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with console(stderr=True).status("Starting Airflow and MLflow"):
            servers.start()
    except RuntimeError as error:
        raise RecordUnavailableError(str(error)) from None
    try:
        _print_places(servers, as_json=as_json)
        if not detach:
            with suppress(KeyboardInterrupt):
                print("They run until Ctrl-C.", file=sys.stderr, flush=True)
                Event().wait()
    finally:
        if not detach:
            print("Stopping", file=sys.stderr)
            servers.stop()


def down(home: Path | None, *, as_json: bool) -> None:
    """End the servers of a home folder; None is the nearest that has any.

    :raises RecordUnavailableError: if none run.
    """
    servers = find_servers(home)
    if servers is None:
        raise RecordUnavailableError("no servers run here: --home says where they were started")
    servers.stop()
    if as_json:
        print_json({"home": str(servers.layout.home), "status": "stopped"})
    else:
        print("The servers are stopped.")


def dags_folder() -> Path:
    """Return the folder of our DAGs, in an installed package or a checkout."""
    package = Path(post_training.__file__).resolve().parent
    installed = package / "dags"
    return installed if installed.is_dir() else package.parents[1] / "dags"


def _print_places(servers: Standalone, *, as_json: bool) -> None:
    places = {
        "airflow": servers.airflow_url,
        "user": "admin",
        "password": servers.password(),
        "mlflow": servers.mlflow_url,
        "api": servers.service_url,
        "home": str(servers.layout.home),
    }
    (print_json if as_json else print_fields)(places)


def _port(option: str, asked: int | None, usual: int) -> int | None:
    """Return a free port; None leaves the choice open.

    :raises JobConflictError: if the one that is asked for is taken.
    """
    if asked is not None and not is_free(asked):
        raise JobConflictError(f"{option}: port {asked} is taken")
    return asked or (usual if is_free(usual) else None)
