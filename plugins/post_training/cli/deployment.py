"""Where the deployment is that the commands speak to, and who calls."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from post_training.client import MOUNT, PostTrainingClient
from post_training.errors import InvalidRequestError, RecordUnavailableError
from post_training.standalone import SERVERS_FILE, Standalone

HOME = ".post-training"
"""Folder in which ``up`` keeps its servers, below the one that it is called in."""

HOMES = (HOME, ".demo")
"""Folders that are looked for: those of ``up`` and of ``make demo``."""

USER_VARIABLE, PASSWORD_VARIABLE = "POST_TRAINING_USER", "POST_TRAINING_PASSWORD"


@dataclass(frozen=True)
class Options:
    """What says which deployment is meant; None is not given.

    :param url: base URL of the API.
    :param token: bearer token.
    :param home: folder of standalone servers.
    """

    url: str | None = None
    token: str | None = None
    home: Path | None = None


def connect(options: Options, environment: Mapping[str, str] = os.environ) -> PostTrainingClient:
    """Return a client of the deployment.

    Without a URL it is that of the servers that run below ``home``, else in the current folder or one above.
    Without a token, the user and password of the environment log in, else the servers' own admin, where the
    URL is theirs.

    :raises InvalidRequestError: naming the option or variable that breaks a rule.
    :raises RecordUnavailableError: if there is no deployment.
    """
    if options.url is not None and options.home is not None:
        raise InvalidRequestError.of("--home", "was given beside a URL: give one of them")
    servers = None if options.url is not None and options.token is not None else find_servers(options.home)
    if options.url is None:
        if servers is None:
            raise RecordUnavailableError(
                "no deployment is known: give --url or POST_TRAINING_URL, or start one: `post-training up`"
            )
        url = servers.service_url
    else:
        url = checked_url(options.url)
    user, secret = _login(options, environment)
    if secret is None and servers is not None and url == servers.service_url:
        user, secret = "admin", servers.password()
    return PostTrainingClient(url, user=user, secret=secret)


def _login(options: Options, environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return user and password, or None and a token, or nothing."""
    if options.token is not None:
        return None, options.token
    user, password = environment.get(USER_VARIABLE), environment.get(PASSWORD_VARIABLE)
    if bool(user) != bool(password):
        missing, given = sorted(
            (USER_VARIABLE, PASSWORD_VARIABLE), key=lambda name: bool(environment.get(name))
        )
        raise InvalidRequestError.of(missing, f"is required beside {given}")
    return user or None, password or None


def checked_url(url: str) -> str:
    """Return the API's base URL; one without a path is Airflow's own.

    :raises InvalidRequestError: if it is none.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise InvalidRequestError.of(
            "--url", f"must hold no login: {USER_VARIABLE} and {PASSWORD_VARIABLE} are its place"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidRequestError.of("--url", f"must have the form http://HOST:PORT{MOUNT}, got {url!r}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or MOUNT}"


def find_servers(home: Path | None, start: Path | None = None) -> Standalone | None:
    """Return the servers that run below a home folder; without one, those that are nearest.

    :param start: the folder to look in first; None is the current one.
    :raises RecordUnavailableError: if none run below the home that is given.
    """
    if home is None:
        for candidate in _homes(start or Path.cwd()):
            with suppress(FileNotFoundError):
                return Standalone.attach(candidate)
        return None
    try:
        return Standalone.attach(home)
    except FileNotFoundError:
        raise RecordUnavailableError(
            f"no servers run under {home}: `post-training up --home {home}` starts them"
        ) from None


def _homes(start: Path) -> Iterator[Path]:
    """Yield the homes in a folder and those above, of the user's own: a file there says what is ended."""
    for folder in (start, *start.parents):
        for name in HOMES:
            file = folder / name / SERVERS_FILE
            if file.exists() and file.stat().st_uid == os.getuid():
                yield file.parent
