"""The installed command line against the real servers, from submit to cancel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.conftest import Deployment
from tests.waiting import wait_until

pytestmark = pytest.mark.system
PROGRAM = Path(sys.executable).with_name("post-training")
"""The entry point, which installing the package makes; `make test` does."""


class Terminal:
    """Calls the command line in a folder, told of the servers by their home alone."""

    def __init__(self, deployment: Deployment, folder: Path) -> None:
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("POST_TRAINING")},
            "POST_TRAINING_HOME": str(deployment.servers.layout.home),
        }
        self._folder = folder

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Call it."""
        return subprocess.Popen(
            [str(PROGRAM), *arguments],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *arguments: str, code: int = 0) -> str:
        """Call it to its end; return what it printed, of a failure to standard error."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=1200)
        assert process.returncode == code, (out, err)
        return err if code else out

    def json(self, *arguments: str) -> Any:
        """Call it with ``--json``; return what it printed."""
        return json.loads(self.call(*arguments, "--json"))


@pytest.fixture
def terminal(deployment: Deployment, tmp_path: Path) -> Terminal:
    return Terminal(deployment, tmp_path)


def test_a_job_from_its_file_to_its_checkpoints(
    deployment: Deployment, terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(deployment.body("by-terminal")))
    assert terminal.call("submit", "lora.yaml") == "by-terminal\n"
    assert terminal.json("submit", "lora.yaml") == {"job_uuid": "by-terminal"}
    log = terminal.call("logs", "-f", "by-terminal")
    assert "progress step 6/6" in log
    assert log.endswith("by-terminal is completed\n")
    assert terminal.call("logs", "by-terminal") == log.removesuffix("by-terminal is completed\n")
    assert "by-terminal" in terminal.call("list").splitlines()
    assert {"job_uuid": "by-terminal"} in terminal.json("list")["data"]
    status = terminal.json("status", "by-terminal")
    assert status["status"] == "completed"
    assert "completed" in terminal.call("status", "by-terminal")
    artifacts = terminal.json("artifacts", "by-terminal")
    assert artifacts["checkpoints"] == status["checkpoints"]
    assert [checkpoint["epoch"] for checkpoint in artifacts["checkpoints"]] == [0, 1]
    table = terminal.call("artifacts", "by-terminal")
    assert all(checkpoint["path"] in table for checkpoint in artifacts["checkpoints"])
    assert "has ended: completed" in terminal.call("cancel", "by-terminal", code=4)


def test_a_job_is_cancelled_while_its_log_is_followed(
    deployment: Deployment, terminal: Terminal, tmp_path: Path
) -> None:
    body = deployment.body("by-terminal-2", n_epochs=100_000, max_validation_steps=0)
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(body))
    terminal.call("submit", "long.yaml")
    follower = terminal.start("logs", "-f", "by-terminal-2", "--json")
    assert follower.stdout is not None
    lines = follower.stdout
    wait_until(lambda: "progress step" in lines.readline())
    assert terminal.call("cancel", "by-terminal-2").startswith("by-terminal-2 is cancelled")
    out, _ = follower.communicate(timeout=1200)
    assert follower.returncode == 1
    assert json.loads(out.splitlines()[-1])["status"] == "cancelled"
    assert terminal.json("status", "by-terminal-2")["status"] == "cancelled"


def test_what_is_wrong_is_told_with_its_field(
    deployment: Deployment, terminal: Terminal, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**deployment.body("refused"), "colour": "red"}))
    assert terminal.call("submit", "bad.yaml", code=2) == "colour: Extra inputs are not permitted\n"
    assert terminal.call("status", "refused", code=3) == "error: no post-training job 'refused'\n"


def test_the_doctor_finds_servers_that_are_well(deployment: Deployment, terminal: Terminal) -> None:
    checks = terminal.json("doctor")["checks"]
    assert {check["name"] for check in checks if check["state"] == "failure"} == set()
    found = {check["name"]: check["found"] for check in checks}
    assert found["MLflow"] == deployment.servers.mlflow_url
    assert found["allowed roots"] == str(deployment.data)
    assert {"API", "Airflow", "devices", "disk", "memory", "packages"} <= found.keys()
