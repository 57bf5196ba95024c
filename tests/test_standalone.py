"""Standalone servers: what they are told, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import post_training
from post_training.certificates import certificates
from post_training.processes import SessionRecord, end_sessions, kill_leader, kill_session, session_alive
from post_training.standalone import SERVERS_FILE, Standalone, main
from post_training.standalone_layout import AIRFLOW_SERVERS, Layout, Ports, free_ports, server_environment
from tests.waiting import wait_until

TREE = """
import subprocess, sys, time
stubborn = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print(flush=True); time.sleep(99)"
for own in (False, True):
    command = [sys.executable, "-c", stubborn]
    child = subprocess.Popen(command, start_new_session=own, stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
time.sleep(99)
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path, tmp_path / "dags", (Path("/data"), Path("/models")), Ports(1, 2, 3, 4))


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A leader with two children that ignore SIGTERM, the second in a session of its own."""
    leader = subprocess.Popen(
        [sys.executable, "-c", TREE],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leader.stdout is not None
    children = [psutil.Process(int(leader.stdout.readline())) for _ in range(2)]
    yield leader, children
    for process in (leader, *children):
        if process.poll() is None if isinstance(process, subprocess.Popen) else process.is_running():
            process.kill()
    leader.wait()
    leader.stdout.close()


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_free_ports_are_different() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert 1023 < min(ports) < max(ports) < 32768, "which a connection may have meanwhile"


def test_servers_are_told_where_everything_is(layout: Layout) -> None:
    env = server_environment(layout, {"admin": "secret"}, {"PATH": "/bin", "LANG": "C"}, {"EXTRA": "1"})
    assert env["PATH"] == f"{Path(sys.executable).parent}:/bin"
    assert (env["LANG"], env["EXTRA"]) == ("C", "1")
    assert env["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:1"
    assert env["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert env["AIRFLOW__POST_TRAINING__ALLOWED_ROOTS"] == "/data,/models"
    assert json.loads(env["AIRFLOW_CONN_MLFLOW_DEFAULT"]) == {
        "conn_type": "mlflow",
        "host": "http://127.0.0.1:2",
    }
    assert json.loads(env["AIRFLOW_CONN_POST_TRAINING_DEFAULT"]) == {
        "conn_type": "post_training",
        "host": "http://127.0.0.1:1/post-training",
        "login": "admin",
        "password": "secret",
    }


def test_a_shell_s_own_airflow_and_mlflow_are_left_alone(layout: Layout) -> None:
    shell = {
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql://production",
        "AIRFLOW_CONN_OTHER": "x",
        "MLFLOW_TRACKING_URI": "http://production",
        "MLFLOW_DISABLE_TELEMETRY": "false",
    }
    env = server_environment(layout, {}, shell, {"AIRFLOW__CORE__PARALLELISM": "2"})
    assert "production" not in " ".join(env.values())
    assert "AIRFLOW_CONN_OTHER" not in env
    assert env["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert env["AIRFLOW__CORE__PARALLELISM"] == "2"


def test_passwords_are_made_once_and_private(tmp_path: Path) -> None:
    first = Standalone(tmp_path, dags_folder=tmp_path).password()
    servers = Standalone(tmp_path, dags_folder=tmp_path, users="admin:admin,eve:viewer")
    assert servers.password() == first
    assert servers.password("eve") not in ("", first)
    assert stat.S_IMODE(servers.layout.passwords_file.stat().st_mode) == 0o600
    with pytest.raises(KeyError):
        servers.password("mallory")


def test_a_whole_tree_ends(tmp_path: Path, tree: tuple[subprocess.Popen[str], list[psutil.Process]]) -> None:
    leader, children = tree
    session = SessionRecord.of(leader.pid, tmp_path)
    assert session_alive(session)
    end_sessions(session, grace=0.2)
    assert leader.wait(timeout=300) == -signal.SIGTERM
    assert all(gone(child) for child in children)
    assert not session_alive(session)
    end_sessions(session)


def test_orphans_of_a_dead_leader_end(
    tmp_path: Path, tree: tuple[subprocess.Popen[str], list[psutil.Process]]
) -> None:
    leader, children = tree
    session = SessionRecord.of(leader.pid, tmp_path)
    leader.kill()
    leader.wait()
    assert session_alive(session)
    end_sessions(session, grace=0.2)
    assert gone(children[0])


def test_sigkill_strikes_the_leader_alone_or_its_whole_session(
    tmp_path: Path, tree: tuple[subprocess.Popen[str], list[psutil.Process]]
) -> None:
    leader, (in_session, _) = tree
    session = SessionRecord.of(leader.pid, tmp_path)
    kill_leader(session)
    assert leader.wait(timeout=300) == -signal.SIGKILL
    assert not gone(in_session)
    kill_session(session)
    wait_until(lambda: gone(in_session))


def test_several_sessions_end_at_the_same_time(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(99)"]
    leaders = [subprocess.Popen(command, cwd=tmp_path, start_new_session=True) for _ in range(2)]
    end_sessions(*(SessionRecord.of(leader.pid, tmp_path) for leader in leaders))
    assert [leader.wait(timeout=300) for leader in leaders] == [-signal.SIGTERM] * 2


def test_a_pid_that_was_given_away_is_left_alone(
    tmp_path: Path, tree: tuple[subprocess.Popen[str], list[psutil.Process]]
) -> None:
    leader, children = tree
    stale = SessionRecord(leader.pid, psutil.Process(leader.pid).create_time() - 1000, str(tmp_path))
    assert not session_alive(stale)
    end_sessions(stale)
    assert leader.poll() is None
    assert not any(gone(child) for child in children)


def test_stop_without_servers_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Standalone(tmp_path, dags_folder=tmp_path).stop()
    with pytest.raises(FileNotFoundError):
        Standalone.attach(tmp_path)
    main(["stop", "--home", str(tmp_path)])
    assert capsys.readouterr().out == "no servers are running\n"


def test_servers_that_died_are_not_found(tmp_path: Path) -> None:
    servers = Standalone(tmp_path, dags_folder=tmp_path)
    servers._write_state()
    with pytest.raises(FileNotFoundError, match="no servers run"):
        Standalone.attach(tmp_path)


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {"airflow": "exec sleep 600", "mlflow": "echo no database; exit 3"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    servers = Standalone(
        tmp_path / "home",
        dags_folder=tmp_path,
        extra_env={"PATH": f"{programs}:{os.environ['PATH']}"},
    )
    with pytest.raises(RuntimeError, match=r"mlflow ended while starting:\nno database"):
        servers.start()
    assert not (tmp_path / "home" / SERVERS_FILE).exists()
    assert processes_in(tmp_path / "home") == []


def processes_in(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(folder) and not gone(p)]


DAG = """
import subprocess
from datetime import timedelta
from airflow.sdk import DAG, task

with DAG("endless", schedule=None, is_paused_upon_creation=False):
    @task(retries=2, retry_delay=timedelta(seconds=1))
    def wait():
        subprocess.run(["sleep", "600"])
    wait()
"""


@pytest.mark.system
def test_both_servers_start_run_a_dag_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = installed_with_endless(tmp_path / "site")
    home = tmp_path / "home"
    places = program("up", "--detach", "--home", str(home))
    servers = Standalone.attach(home)
    try:
        assert (servers.airflow_url, servers.mlflow_url) == (places["airflow"], places["mlflow"])
        assert httpx.get(f"{places['mlflow']}/health", timeout=120).is_success
        with monkeypatch.context() as patch:
            patch.setattr(httpx, "post", silent_once(httpx.post))
            servers.wait_until_ready()
        with pytest.raises(RuntimeError, match="stop them first"):
            servers.start()
        runs = f"{places['airflow']}/api/v2/dags/endless/dagRuns"
        token = servers.token()
        wait_until(lambda: trigger(runs, token) == 200)
        wait_until(lambda: any(p.name() == "sleep" for p in processes_in(home)))
        for name in AIRFLOW_SERVERS:
            servers.kill_server(name)
        servers.kill_server("mlflow", session=True)
        wait_until(lambda: not reachable(places["airflow"]) and not reachable(places["mlflow"]))
        for name in ("mlflow", "api-server"):
            servers.start_server(name)
        wait_until(lambda: reachable(places["airflow"]) and reachable(places["mlflow"]))
        code = wait_until(lambda: (code := trigger(runs, token)) < 500 and code)
        assert code == 200, "the keys are still the same"
        assert any(p.name() == "sleep" for p in processes_in(home))
        # Those that we started too.
        assert program("down", "--home", str(home)) == {"home": str(home), "status": "stopped"}
        assert processes_in(home) == []
        assert not (home / SERVERS_FILE).exists()
    finally:
        servers.stop()
    assert stat.S_IMODE((home / "airflow" / "airflow.cfg").stat().st_mode) == 0o600
    assert (home / "mlflow" / "mlflow.db").exists()


def installed_with_endless(site: Path) -> Callable[..., Any]:
    """Lay out the package as installing it does, with one DAG more; return its command line, as JSON."""
    package = site / "post_training"
    shutil.copytree(Path(post_training.__file__).parent, package)
    shutil.copytree(Path(__file__).parents[1] / "dags", package / "dags")
    (package / "dags" / "endless.py").write_text(DAG)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    program = Path(sys.executable).with_name("post-training")

    def call(*arguments: str) -> Any:
        done = subprocess.run(
            [program, *arguments, "--json"],
            cwd=site,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def trigger(url: str, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.post(url, headers=headers, json={"logical_date": None}, timeout=120).status_code


def silent_once(post: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
    """Return what does as ``post`` does, after a first call that no server answers in time."""
    calls = count()

    def call(*arguments: Any, **named: Any) -> httpx.Response:
        if next(calls) == 0:
            raise httpx.ReadTimeout("timed out")
        return post(*arguments, **named)

    return call


def reachable(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, verify=certificates()).status_code < 500
    except httpx.HTTPError:
        return False
