"""The service ``secrets``: the program itself, in folders as its volumes."""

from __future__ import annotations

import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

PROGRAM = Path(__file__).resolve().parents[2] / "docker" / "init" / "secret_files.py"
READERS = ("base", "postgres", "redis", "mlflow", "servers", "people", "workers")
PLACES = {
    "AIRFLOW_DATABASE": "db:5432",
    "SEARCH_DATABASE": "db:5432",
    "MLFLOW_DATABASE": "db:5432",
    "BROKER": "redis:6379",
    "MLFLOW_URL": "http://mlflow:5000",
    "MLFLOW_PUBLIC_URL": "https://mlflow.example.org",
    "POST_TRAINING_URL": "http://api:8080/post-training",
    "AIRFLOW_USERS": "admin:admin,ann:viewer",
}


def run(root: Path, **changed: str) -> subprocess.CompletedProcess[str]:
    for reader in READERS:
        (root / reader).mkdir(parents=True, exist_ok=True)
    words = [f"{reader}={root / reader}" for reader in READERS]
    environment = {**os.environ, **PLACES, **changed}
    return subprocess.run(
        [sys.executable, PROGRAM, *words], env=environment, capture_output=True, text=True, check=False
    )


def made(root: Path, **changed: str) -> dict[str, str]:
    done = run(root, **changed)
    assert done.returncode == 0, done.stderr
    return {
        str(file.relative_to(root)): file.read_text() for file in sorted(root.rglob("*")) if file.is_file()
    }


def connections(files: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files["servers/connections.json"])
    return found


def test_readers_agree_on_what_they_share(tmp_path: Path) -> None:
    files = made(tmp_path)
    shared = ("broker_url", "result_backend", "api_secret_key", "search_storage", "ray_token")
    assert {name: files[f"workers/{name}"] for name in shared} == {
        name: files[f"servers/{name}"] for name in shared
    }
    redis = files["redis/password"]
    assert f"requirepass {redis}\n" in files["redis/redis.conf"]
    assert files["workers/broker_url"] == f"redis://:{redis}@redis:6379/0"
    airflow = f"postgresql+psycopg2://airflow:{files['postgres/airflow']}@db:5432/airflow"
    assert files["servers/database_url"] == airflow
    auth = configparser.ConfigParser(interpolation=None)
    auth.read_string(files["mlflow/auth.ini"])
    assert connections(files)["mlflow_default"]["password"] == auth["mlflow"]["admin_password"]
    assert auth["mlflow"]["database_uri"] == files["mlflow/backend_store_uri"]
    users = json.loads(files["people/passwords.json"])
    assert users.keys() == {"admin", "ann"}
    assert connections(files)["post_training_default"]["password"] == users["admin"]
    Fernet(files["servers/fernet_key"])  # which refuses what is no key


def test_a_worker_is_not_told_what_only_servers_need(tmp_path: Path) -> None:
    files = made(tmp_path)
    told = "".join(text for name, text in files.items() if name.startswith("workers/"))
    for name in (
        "postgres/password",
        "postgres/airflow",
        "postgres/mlflow",
        "servers/fernet_key",
        "servers/jwt_secret",
    ):
        assert files[name] not in told


def test_no_two_secrets_are_the_same_and_none_is_short(tmp_path: Path) -> None:
    base = json.loads(made(tmp_path)["base/secrets.json"])
    assert len({*base.values()}) == len(base)
    assert all(len(value) >= 43 for value in base.values())


def test_secrets_stay_and_new_addresses_and_people_take_effect(tmp_path: Path) -> None:
    first = made(tmp_path)
    assert made(tmp_path) == first
    moved = made(tmp_path, BROKER="other:6379", AIRFLOW_USERS="admin:admin,bob:user")
    assert moved["workers/broker_url"] == first["workers/broker_url"].replace("redis:6379", "other:6379")
    people = json.loads(moved["people/passwords.json"])
    assert people.keys() == {"admin", "bob"}
    assert people["admin"] == json.loads(first["people/passwords.json"])["admin"]
    assert moved["postgres/password"] == first["postgres/password"]


def test_only_the_owner_reads_them_but_for_redis_in_a_volume_of_its_own(tmp_path: Path) -> None:
    made(tmp_path)
    modes = {file: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()}
    of = {file.parent.name: mode for file, mode in modes.items()}
    assert {name: mode for name, mode in of.items() if mode != 0o400} == {"redis": 0o444, "people": 0o600}
    assert len(set(modes.values())) == 3


def test_people_without_the_one_who_reconciles_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, AIRFLOW_USERS="ann:viewer")
    assert done.returncode == 1
    assert "AIRFLOW_USERS must name admin" in done.stderr


def keep(root: Path, name: str, secret: str) -> subprocess.CompletedProcess[str]:
    (root / "base").mkdir(exist_ok=True)
    words = [sys.executable, PROGRAM, "keep", name, root / "base"]
    return subprocess.run(words, input=secret, capture_output=True, text=True, check=False)


def test_a_secret_of_ones_own_reaches_its_readers_and_the_others_stay(tmp_path: Path) -> None:
    before = made(tmp_path)
    assert before["workers/ray_token"] == ""
    assert keep(tmp_path, "ray", "of the cluster\n").returncode == 0
    after = made(tmp_path)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"base/secrets.json", "workers/ray_token", "servers/ray_token"}
    assert after["workers/ray_token"] == "of the cluster"


def test_a_secret_that_is_kept_before_the_first_start_is_taken(tmp_path: Path) -> None:
    assert keep(tmp_path, "postgres", "chosen").returncode == 0
    assert made(tmp_path)["postgres/password"] == "chosen"


@pytest.mark.parametrize(
    ("name", "secret", "error"),
    [("rai", "x", "must be one of airflow, .* got 'rai'"), ("ray", "\n", "secret ray must not be empty")],
)
def test_a_secret_that_nobody_reads_or_that_is_empty_is_refused(
    tmp_path: Path, name: str, secret: str, error: str
) -> None:
    done = keep(tmp_path, name, secret)
    assert done.returncode == 1
    assert re.search(error, done.stderr)
    assert not [*(tmp_path / "base").iterdir()]


def test_secrets_of_another_machine_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "broker_url").write_text("redis://of-the-first-machine")
    done = run(tmp_path)
    assert done.returncode == 1
    assert "workers must be empty where" in done.stderr
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"workers/broker_url"}
    assert (tmp_path / "workers" / "broker_url").read_text() == "redis://of-the-first-machine"
