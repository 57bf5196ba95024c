"""The command line in this process, and our API on a real port, as standalone servers have it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from typer.testing import CliRunner

from post_training.cli.app import app
from post_training.processes import SessionRecord
from post_training.standalone import SERVERS_FILE
from tests.lightning_modules.tiny import ROWS
from tests.operators.conftest import ApiServer
from tests.requests_of import sft_body

if TYPE_CHECKING:
    from typer.testing import Result

HEALTHY = {"metadatabase": {"status": "healthy"}, "scheduler": {"status": "healthy"}}
Cli = Callable[..., "Result"]


class Airflow(ApiServer):
    """An api-server that tells of its health."""

    def __init__(self) -> None:
        super().__init__()
        self.health: dict[str, Any] = HEALTHY
        self.root.get("/api/v2/monitor/health")(lambda: self.health)


@pytest.fixture
def airflow() -> Iterator[Airflow]:
    server = Airflow()
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and an environment that names no deployment."""
    for name in [name for name in os.environ if name.startswith(("POST_TRAINING", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def servers(airflow: Airflow, folder: Path) -> Path:
    """The home of what looks like servers of `up`: the API above, and this process as the one that runs."""
    return write_home(folder / ".post-training", airflow.port)


@pytest.fixture
def cli() -> Cli:
    """Call the command line with these arguments."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)

    return call


@pytest.fixture
def data(folder: Path) -> Path:
    """A data set and the folder of a model, by relative names."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return folder


@pytest.fixture
def request_file(data: Path) -> Path:
    """A valid request without an id of its own."""
    return write_request(data / "lora.yaml", sft_body(model="./model", job_uuid=...))


def write_home(home: Path, port: int, pid: int | None = None) -> Path:
    """Write what `up` leaves in its home.

    :param port: of the api-server.
    :param pid: of a process that runs; None is this one.
    """
    home.mkdir(parents=True)
    ports = {"airflow": port, "mlflow": 1, "worker_logs": 2, "triggerer_logs": 3}
    session = SessionRecord.of(pid or os.getpid(), home)
    state = {
        "dags_folder": str(home),
        "allowed_roots": [str(home.parent)],
        "users": "admin:admin",
        "dag_ids": [],
        "extra_env": {},
        "ports": ports,
        "sessions": {"api-server": [asdict(session)]},
    }
    (home / SERVERS_FILE).write_text(json.dumps(state))
    (home / "passwords.json").write_text(json.dumps({"admin": "right"}))
    return home


def write_request(file: Path, body: dict[str, Any]) -> Path:
    """Write a request as YAML."""
    file.write_text(yaml.safe_dump(body))
    return file
