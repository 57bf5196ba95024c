"""What stands on this machine for an image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster import images
from cluster.cluster import COMPOSE_FILE, Cluster
from cluster.compose import read_services
from cluster.images import (
    AIRFLOW_HOME,
    LOGS,
    OURS,
    ROOT,
    image_environment,
    is_ours,
    missing_packages,
    search_path,
    start_of,
)

DATA = "/var/lib/postgresql/data"
SETTINGS = {"POSTGRES_PASSWORD_FILE": "/run/pw", "POSTGRES_INITDB_ARGS": "--auth-host=scram-sha-256"}


def test_postgresql_is_made_ready_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    first = start_of("postgres:15.18", ["postgres", "-c", "a=b"], SETTINGS, {DATA: tmp_path})
    initdb, access = first.prepare
    assert initdb[:3] == ("initdb", "-D", str(tmp_path))
    assert {"/run/pw", "--auth-host=scram-sha-256"} <= {*initdb}
    assert str(tmp_path / "pg_hba.conf") in access[-1]
    (tmp_path / "PG_VERSION").touch()
    again = start_of("postgres:15.18", ["postgres", "-c", "a=b"], SETTINGS, {DATA: tmp_path})
    assert (again.command, again.prepare) == (first.command, ())
    assert again.command[:3] == ("postgres", "-D", str(tmp_path))
    assert again.command[-2:] == ("-c", "a=b")


def test_root_runs_postgresql_as_somebody_else_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(images, "_AS_NOBODY_SPECIAL", ("env", "WHO=somebody"))
    start = start_of("postgres:15.18", ["postgres"], SETTINGS, {DATA: tmp_path})
    assert start.command[:3] == ("env", "WHO=somebody", "postgres")
    assert start.prepare[0][:3] == ("env", "WHO=somebody", "initdb")
    monkeypatch.setattr(images, "_AS_NOBODY_SPECIAL", ("false",))
    with pytest.raises(RuntimeError, match="gives root no user namespace"):
        start_of("postgres:15.18", ["postgres"], SETTINGS, {DATA: tmp_path})


def test_the_newest_postgresql_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("9", "15", "17"):
        (tmp_path / version / "bin").mkdir(parents=True)
    monkeypatch.setattr(images, "_POSTGRES_VERSIONS", tmp_path)
    found = [part for part in search_path().split(":") if part.startswith(str(tmp_path))]
    assert found == [str(tmp_path / version / "bin") for version in ("17", "15", "9")]


def test_a_missing_program_is_named_by_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "search_path", lambda: str(tmp_path))
    assert missing_packages() == ["postgresql", "redis-server"]
    with pytest.raises(RuntimeError, match="install Debian's packages postgresql redis-server first"):
        Cluster(tmp_path / "home").start()
    assert not (tmp_path / "home").exists()


def test_what_stands_for_our_images_is_what_the_dockerfile_makes(tmp_path: Path) -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    variables = dict(re.findall(r"^(?:ENV|   ) ([A-Z_]+)=(\S+)", text, re.MULTILINE))
    assert variables.pop("PATH").startswith("/opt/venv/bin:")  # this interpreter's folder comes first here
    assert variables.pop("PYTHONDONTWRITEBYTECODE") == "1"  # its modules are compiled, a checkout's are not
    assert variables.pop("AIRFLOW_HOME") == AIRFLOW_HOME
    ours = image_environment("post-training-airflow", tmp_path)
    assert {name: ours[name] for name in variables} == variables
    own = {"AIRFLOW_HOME", "PYTHONPATH", "AIRFLOW__CORE__HOSTNAME_CALLABLE"}
    assert ours.keys() == variables.keys() | own
    for name in ("airflow", "trainer"):
        lines = text.partition(f"FROM base AS {name}\n")[2].partition("\nFROM ")[0]
        copied = re.findall(r"^COPY (?!--from)(\S+) (\S+)$", lines, re.MULTILINE)
        assert {target: ROOT / source for source, target in copied} == OURS


def test_what_a_service_writes_is_a_folder_that_the_dockerfile_gives_it() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    made = re.search(r"install --directory --owner airflow --group airflow((?:\s|\\|/\S+)+)", text)
    assert made
    folders = {word for word in made[1].split() if word != "\\"}
    assert {AIRFLOW_HOME, LOGS} <= folders
    of_secrets = "/run/people"  # its volume is the service secrets', which makes it first
    written = {
        mount.target
        for service in read_services(COMPOSE_FILE, {}).values()
        for mount in service.mounts
        if is_ours(service.image) and mount.volume and not mount.read_only
    }
    assert written - {of_secrets} <= folders
    assert {"/var/lib/post-training", LOGS, "/secrets/base"} <= written
