"""The commands as they are called: help, completion, usage, and how errors end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import post_training
from post_training.cli import jobs
from post_training.cli.app import app
from tests.cli.conftest import Airflow, Cli

ROOT = Path(__file__).parents[2]
COMMANDS = {"up", "down", "run", "submit", "list", "status", "logs", "cancel", "artifacts", "doctor"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}"}


def test_help_names_every_command_and_the_exit_codes(cli: Cli) -> None:
    done = cli("--help")
    assert done.exit_code == 0
    for word in (*COMMANDS, "Exit codes", "130"):
        assert word in done.stdout


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_has_help_and_json(cli: Cli, command: str) -> None:
    done = cli(command, "-h")
    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_it_tells_its_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"{post_training.__version__}\n"


@pytest.mark.parametrize("arguments", [["status"], ["nothing"], ["list", "--limit", "x"], ["run", "a", "b"]])
def test_wrong_usage_is_refused(cli: Cli, arguments: list[str]) -> None:
    assert cli(*arguments).exit_code == 2


def test_it_completes_in_the_shell() -> None:
    asked = {"_POST_TRAINING_COMPLETE": "complete_bash", "COMP_WORDS": "post-training sta", "COMP_CWORD": "1"}
    assert CliRunner().invoke(app, [], prog_name="post-training", env=asked).stdout == "status\n"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from post_training.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "names = ('airflow', 'torch', 'mlflow', 'httpx', 'pydantic', 'yaml', 'psutil', 'fastapi')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_command_imports_airflow_or_torch() -> None:
    modules = ("training", "doctor", "servers", "jobs")
    program = (
        f"import sys\nfrom post_training.cli import {', '.join(modules)}\n"
        "print([name for name in ('airflow', 'torch', 'mlflow', 'fastapi') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/x"), 1, "[Errno 13] Permission denied: '/x'"),
    ],
)
def test_other_ends(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(jobs, "list_jobs", fail)
    called = ("list", "--url", "http://airflow", "--token", "t")
    done = cli(*called)
    assert (done.exit_code, done.stderr) == (code, f"error: {said}\n" if said else "")
    done = cli(*called, "--json")
    assert (done.exit_code, done.stderr) == (code, json.dumps({"error": said}) + "\n" if said else "")


def test_options_come_from_the_environment_too(airflow: Airflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POST_TRAINING_URL", airflow.url)
    monkeypatch.setenv("POST_TRAINING_TOKEN", "token-of-admin")
    done = CliRunner().invoke(app, ["list", "--json"])
    assert (done.exit_code, done.stdout) == (0, '{\n  "data": []\n}\n')


def test_the_password_is_no_option(cli: Cli) -> None:
    for command in sorted(COMMANDS):
        assert "--password" not in cli(command, "-h").stdout
