"""Starting and ending the servers: what they are told, what is refused. A system test starts real ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from post_training.cli import servers
from post_training.cli.servers import dags_folder
from post_training.standalone import Standalone
from post_training.standalone_layout import free_ports
from tests.cli.conftest import Cli, write_home
from tests.waiting import wait_until


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Standalone]]:
    """What was started and stopped, instead of the real servers."""
    calls: list[tuple[str, Standalone]] = []

    def start(self: Standalone) -> Standalone:
        calls.append(("start", self))
        return self

    monkeypatch.setattr(Standalone, "start", start)
    monkeypatch.setattr(Standalone, "stop", lambda self: calls.append(("stop", self)))
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda *_: before)
    return calls


def test_up_starts_both_and_says_where_they_are(
    cli: Cli, folder: Path, started: list[tuple[str, Standalone]]
) -> None:
    done = cli("up", "--detach", "--json")
    assert done.exit_code == 0
    ((call, found),) = started
    assert call == "start"
    assert found.layout.home == folder / ".post-training"
    assert found.layout.allowed_roots == (folder,)
    assert json.loads(done.stdout) == {
        "airflow": found.airflow_url,
        "user": "admin",
        "password": found.password(),
        "mlflow": found.mlflow_url,
        "api": found.service_url,
        "home": str(found.layout.home),
    }


def test_options_take_effect(
    cli: Cli, folder: Path, tmp_path: Path, started: list[tuple[str, Standalone]]
) -> None:
    airflow, mlflow = free_ports(2)
    data = tmp_path / "data"
    data.mkdir()
    done = cli(
        *("up", "-d", "--home", tmp_path / "home", "--allowed-root", data, "--allowed-root", folder),
        *("--airflow-port", airflow, "--mlflow-port", mlflow),
    )
    assert f"http://127.0.0.1:{airflow}/post-training" in done.stdout
    ((_, found),) = started
    assert (found.layout.ports.airflow, found.layout.ports.mlflow) == (airflow, mlflow)
    assert found.layout.home == tmp_path / "home"
    assert found.layout.allowed_roots == (data, folder)


def test_without_detach_they_end_at_ctrl_c(
    cli: Cli, started: list[tuple[str, Standalone]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(servers, "Event", Interrupted)
    assert cli("up").exit_code == 0
    assert [call for call, _ in started] == ["start", "stop"]


def test_what_is_taken_or_missing_is_refused(
    cli: Cli, folder: Path, started: list[tuple[str, Standalone]]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cli("up", "--airflow-port", taken.getsockname()[1])
    assert (done.exit_code, done.stderr.partition(": port")[0]) == (4, "error: --airflow-port")
    done = cli("up", "--allowed-root", folder / "nothing")
    assert done.exit_code == 2
    assert done.stderr.startswith("--allowed-root: must be a folder, got ")
    assert cli("up", "--mlflow-port", 0).exit_code == 2
    write_home(folder / ".post-training", 1)
    done = cli("up")
    assert done.exit_code == 4
    assert "servers run under" in done.stderr
    assert started == []


def test_servers_that_do_not_start_are_told_of(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Any) -> None:
        raise RuntimeError("mlflow ended while starting:\nno database")

    monkeypatch.setattr(Standalone, "start", start)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    done = cli("up")
    assert (done.exit_code, done.stderr) == (5, "error: mlflow ended while starting:\nno database\n")


def test_down_ends_what_runs(cli: Cli, folder: Path) -> None:
    home = folder / ".post-training"
    home.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(99)"], cwd=home, start_new_session=True
    )
    home.rmdir()
    write_home(home, 1, process.pid)
    done = cli("down")
    assert (done.exit_code, done.stdout) == (0, "The servers are stopped.\n")
    assert process.wait(timeout=300) == -signal.SIGTERM
    done = cli("down", "--json")
    assert done.exit_code == 5
    assert "no servers run here" in done.stderr


def test_sigterm_ends_them_as_ctrl_c_does(folder: Path) -> None:
    program = (
        "import sys\n"
        "from post_training.standalone import Standalone\n"
        "Standalone.start = lambda self: self\n"
        "Standalone.stop = lambda self: print('stopped', flush=True)\n"
        "from post_training.cli.app import app\n"
        "app(['up'])\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{root / 'plugins'}:{root}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    stderr = process.stderr
    wait_until(lambda: "until Ctrl-C" in stderr.readline())
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "stopped"


def test_our_dags_are_found() -> None:
    assert (dags_folder() / "supervised_fine_tune.py").is_file()
