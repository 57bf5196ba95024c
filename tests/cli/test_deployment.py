"""How the deployment is found, and who calls."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from post_training.cli.deployment import Options, checked_url, connect, find_servers
from post_training.errors import ForbiddenError, InvalidRequestError, RecordUnavailableError
from post_training.standalone import SERVERS_FILE
from tests.cli.conftest import Airflow, write_home

LOGIN = {"POST_TRAINING_USER": "admin", "POST_TRAINING_PASSWORD": "right"}


def test_the_servers_that_run_here_are_found_with_their_password(servers: Path, airflow: Airflow) -> None:
    client = connect(Options(), {})
    assert client.url == airflow.url
    assert client.list_jobs().data == []


def test_they_are_found_from_a_folder_below(servers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = servers.parent / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    found = find_servers(None)
    assert found is not None
    assert found.layout.home == servers


def test_those_of_make_demo_are_found(airflow: Airflow, folder: Path) -> None:
    write_home(folder / ".demo", airflow.port)
    assert connect(Options(), {}).list_jobs().data == []


def test_a_home_is_taken_by_its_name(airflow: Airflow, tmp_path: Path) -> None:
    home = write_home(tmp_path / "elsewhere", airflow.port)
    assert connect(Options(home=home), {}).list_jobs().data == []
    with pytest.raises(RecordUnavailableError, match=r"no servers run under .*nothing"):
        connect(Options(home=tmp_path / "nothing"), {})


def test_servers_of_another_user_are_left_alone(servers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: (servers / SERVERS_FILE).stat().st_uid + 1)
    assert find_servers(None) is None


def test_servers_that_have_died_are_passed_over(servers: Path, airflow: Airflow, tmp_path: Path) -> None:
    (servers / SERVERS_FILE).write_text(
        (servers / SERVERS_FILE).read_text().replace('"started": ', '"started": 9')
    )
    assert find_servers(None) is None
    further = write_home(tmp_path / ".post-training", airflow.port)
    found = find_servers(None)
    assert found is not None
    assert found.layout.home == further


def test_without_any_it_is_said_what_to_do() -> None:
    with pytest.raises(RecordUnavailableError, match=r"POST_TRAINING_URL.*post-training up"):
        connect(Options(), {})


def test_a_url_is_called_with_a_token_or_a_login(airflow: Airflow) -> None:
    assert connect(Options(airflow.url, "token-of-admin"), {}).list_jobs().data == []
    assert connect(Options(airflow.url), LOGIN).list_jobs().data == []
    with pytest.raises(ForbiddenError, match="Not authenticated"):
        connect(Options(airflow.url), {}).list_jobs()


def test_a_token_comes_before_a_login_and_both_before_the_servers_own(servers: Path) -> None:
    with pytest.raises(ForbiddenError, match="Not authenticated"):
        connect(Options(token="wrong"), LOGIN).list_jobs()
    with pytest.raises(ForbiddenError, match="login of 'admin'"):
        connect(Options(), {**LOGIN, "POST_TRAINING_PASSWORD": "wrong"}).list_jobs()


def test_the_servers_own_password_goes_to_them_alone(servers: Path, airflow: Airflow) -> None:
    assert connect(Options(airflow.url), {}).list_jobs().data == []
    other = Airflow()
    other.start()
    try:
        with pytest.raises(ForbiddenError, match="Not authenticated"):
            connect(Options(other.url), {}).list_jobs()
    finally:
        other.stop()


@pytest.mark.parametrize("given", LOGIN)
def test_half_a_login_is_refused(given: str) -> None:
    (missing,) = LOGIN.keys() - {given}
    with pytest.raises(InvalidRequestError, match=f"^{missing}: is required beside {given}"):
        connect(Options("http://airflow"), {given: "x", missing: ""})


def test_a_home_beside_a_url_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="--home: was given beside a URL"):
        connect(Options("http://airflow", home=Path("x")), {})


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://airflow:8080", "http://airflow:8080/post-training"),
        ("http://airflow:8080/", "http://airflow:8080/post-training"),
        ("https://airflow/post-training/", "https://airflow/post-training"),
        ("https://host/airflow/post-training", "https://host/airflow/post-training"),
    ],
)
def test_a_url_without_a_path_is_airflows(given: str, url: str) -> None:
    assert checked_url(given) == url


@pytest.mark.parametrize(
    "url", ["airflow:8080", "ftp://airflow", "http://", "http://a/b?c=d", "http://a#b", ""]
)
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"--url: must have the form .*got"):
        checked_url(url)


def test_a_login_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidRequestError, match="--url: must hold no login") as caught:
        checked_url("http://me:secret@airflow")
    assert "secret" not in str(caught.value)
