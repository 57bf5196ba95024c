"""What the doctor finds, and what it says is to be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from post_training.cli import doctor
from post_training.cli.deployment import Options
from post_training.cli.doctor import Check
from tests.cli.conftest import Airflow, Cli
from tests.mlflow_server import MLflowServer

GIB = 2**30


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ask an interpreter for devices that answers at once; on a machine without Airflow."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "_PROBE", "print('[[\"H100\", 85899345920]]')")
    for name in [name for name in os.environ if name.startswith("AIRFLOW_")]:
        monkeypatch.delenv(name)


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_all_is_well(
    cli: Cli, servers: Path, mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli("doctor", "--tracking-uri", mlflow_server.uri, "--json")
    checks = by_name(Check(**check) for check in json.loads(done.stdout)["checks"])
    failed = {name: check for name, check in checks.items() if check.state == "failure"}
    assert (done.exit_code, failed) == (0, {})
    assert f"python {sys.version.split()[0]}" in checks["versions"].found
    assert f"torch {metadata.version('torch')}" in checks["versions"].found
    assert checks["devices"].found.endswith("cores, H100 (80.0 GiB)")
    assert str(servers) in checks["disk"].found
    assert checks["allowed roots"].found == str(servers.parent)
    assert checks["API"].found.endswith("/post-training: 0 jobs")
    assert checks["Airflow"].state == "ok"
    assert checks["MLflow"].found == mlflow_server.uri


def test_without_a_deployment_nothing_has_failed(cli: Cli) -> None:
    done = cli("doctor")
    assert done.exit_code == 0
    assert "no deployment is known" in done.stdout
    assert "post-training up" in done.stdout


def test_a_failure_is_the_exit_code(cli: Cli) -> None:
    done = cli("doctor", "--url", "http://127.0.0.1:9", "--json")
    assert done.exit_code == 1
    check = by_name(Check(**check) for check in json.loads(done.stdout)["checks"])["API"]
    assert check.state == "failure"
    assert "does not answer" in check.found


def test_a_wrong_login_and_unhealthy_servers_are_told_with_their_remedy(airflow: Airflow) -> None:
    states = {
        "metadatabase": "unhealthy",
        "scheduler": "unhealthy",
        "dag_processor": None,
        "triggerer": None,
        "another": "healthy",
    }
    airflow.health = {name: {"status": state} for name, state in states.items()}
    checks = list(doctor.api(Options(airflow.url, "wrong")))
    assert (checks[0].state, checks[0].remedy) == (
        "failure",
        "set POST_TRAINING_TOKEN, or POST_TRAINING_USER and POST_TRAINING_PASSWORD",
    )
    assert [(check.state, check.found, check.remedy) for check in checks[1:]] == [
        ("failure", "metadatabase is unhealthy", "airflow db check, on the api-server's machine"),
        ("failure", "scheduler is unhealthy", "start it: airflow scheduler"),
        ("failure", "dag_processor has never run", "start it: airflow dag-processor"),
        ("warning", "triggerer has never run", "start it: airflow triggerer"),
        ("ok", "another is healthy", None),
    ]


def test_an_option_that_breaks_a_rule_is_no_missing_server() -> None:
    (check,) = doctor.api(Options("nonsense"))
    assert (check.state, check.remedy) == ("failure", None)
    assert "--url: must have the form" in check.found


def test_an_mlflow_that_is_away_is_a_failure() -> None:
    assert doctor.mlflow("http://127.0.0.1:9").state == "failure"
    assert doctor.mlflow("sqlite:///x.db") == Check("MLflow", "ok", "sqlite:///x.db: a store, no server")
    assert doctor.mlflow(None).state == "ok"


@pytest.mark.parametrize(("free", "state"), [(20 * GIB, "ok"), (5 * GIB, "warning"), (GIB // 2, "failure")])
def test_a_full_disk_is_told(free: int, state: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free, total=100 * GIB))
    check = doctor.disk(folder / "not" / "made" / "yet")
    assert check.state == state
    assert (check.remedy is None) is (state == "ok")


@pytest.mark.parametrize(("free", "state"), [(4 * GIB, "ok"), (GIB, "warning")])
def test_little_memory_is_told(free: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=free, total=16 * GIB)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    assert doctor.memory().state == state


def test_roots_that_are_not_there_are_told(folder: Path) -> None:
    states = [check.state for check in doctor.roots((folder, folder / "nothing"))]
    assert states == ["ok", "failure"]
    assert [check.state for check in doctor.roots(())] == ["warning"]
    assert [check.state for check in doctor.roots(None)] == ["ok"]


def test_an_interpreter_without_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import nothing_like_torch")
    check = doctor.devices(sys.executable)
    assert (check.state, check.remedy) == ("warning", "pip install 'airflow-provider-post-training[train]'")
    assert "No module named 'nothing_like_torch'" in check.found
    assert doctor.devices("/no/python").state == "failure"


def test_a_cpu_without_tcmalloc_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "print('[]')")
    monkeypatch.setattr(doctor, "tcmalloc", lambda: None)
    assert doctor.devices(sys.executable).state == "warning"
    monkeypatch.setattr(doctor, "tcmalloc", lambda: "libtcmalloc.so")
    assert doctor.devices(sys.executable).found.endswith("cores, no GPU")


def test_packages_are_held_against_what_ours_requires(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "pydantic>=2",
        "not-there>=1",
        "rich<1",
        'torch>=2; extra == "train"',
        'optuna<1; extra == "search"',
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: required)
    checks = by_name(doctor.versions())
    assert checks["packages"].state == "failure"
    assert checks["packages"].found == f"not-there is missing, rich is {metadata.version('rich')}, not <1"
    assert checks["packages of [train]"] == Check("packages of [train]", "ok", "all 1 as required")
    assert checks["packages of [search]"].state == "warning"
    assert checks["packages of [search]"].remedy == "pip install 'airflow-provider-post-training[search]'"


def test_sources_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(doctor.metadata, "requires", unknown)
    assert by_name(doctor.versions())["packages"].remedy == "pip install ."


def test_airflows_own_settings_are_read_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__ALLOWED_ROOTS", str(folder))
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__HOME", str(folder / "home"))
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__TRAINER_PYTHON", "/opt/python")
    place = doctor.place_of(Options(), None, os.environ)
    assert (place.allowed_roots, place.home, place.python) == ((folder,), folder / "home", "/opt/python")


def test_airflows_file_in_its_default_home_is_read(tmp_path: Path) -> None:
    file = tmp_path / "airflow" / "airflow.cfg"
    file.parent.mkdir()
    file.write_text(f"[post_training]\nallowed_roots = {tmp_path}\n")
    program = (
        "import os\n"
        "from post_training.cli.doctor import Options, connections, place_of\n"
        "place = place_of(Options(), None, os.environ)\n"
        "print(*place.allowed_roots, *(check.state for check in connections(place.connections)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"{tmp_path} warning warning"], done.stderr


def test_a_setting_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__MAX_BODY_BYTES", "0")
    settings = by_name(doctor.all_checks(Options(), None))["settings"]
    assert settings.state == "failure"
    assert "max_body_bytes" in settings.found


def test_the_connections_of_tasks_are_used(
    mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")
    monkeypatch.setenv("AIRFLOW_CONN_OURS", json.dumps({"conn_type": "mlflow", "host": mlflow_server.uri}))
    monkeypatch.setenv("AIRFLOW_CONN_NONE", json.dumps({"conn_type": "post_training", "host": "127.0.0.1:1"}))
    checks = by_name(doctor.connections(doctor.Connections("ours", "none")))
    assert (checks["connection ours"].state, checks["connection ours"].found) == ("ok", "MLflow answers")
    assert checks["connection none"].state == "failure"
    monkeypatch.setenv("AIRFLOW_CONN_OURS", json.dumps({"conn_type": "mlflow"}))
    checks = by_name(doctor.connections(doctor.Connections("ours", "missing")))
    assert "has no host" in checks["connection ours"].found
    assert checks["connection missing"].state == "warning"
    assert "airflow connections add missing" in str(checks["connection missing"].remedy)
