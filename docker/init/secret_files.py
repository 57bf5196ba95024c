"""Write the secrets of a cluster: ``python secret_files.py READER=FOLDER …``, a folder for each reader.

What was made once is kept in the folder of ``base`` and stays the same; what is derived from it is written
anew, so that another address of a server takes effect. The addresses come from the environment:
``AIRFLOW_DATABASE``, ``SEARCH_DATABASE``, ``MLFLOW_DATABASE`` and ``BROKER`` as HOST:PORT, ``MLFLOW_URL``,
``MLFLOW_PUBLIC_URL`` and ``POST_TRAINING_URL``; the people who may sign in from ``AIRFLOW_USERS``
(``name:role``, comma separated).

``python secret_files.py keep NAME FOLDER < FILE`` puts a secret of your own into the folder of ``base``.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

LOGINS = ("airflow", "mlflow", "searches")
"""Databases, each with a role of its name."""

MODES = {"redis": 0o444, "people": 0o600}
"""Redis drops to a user of its own before it reads, Airflow opens its people to write; each has a volume."""

OTHERS = ("postgres", "redis", "mlflow_admin", "mlflow_flask", "api", "jwt")

BASE = "secrets.json"

GIVEN = "ray"
"""The token of a Ray cluster, which nobody here makes; empty where there is none."""


def keep_base(file: Path, users: list[str]) -> dict[str, str]:
    """Return the passwords and keys of a cluster; those that are not there yet are made and kept.

    :param users: who may sign in to Airflow.
    """
    base: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    names = [*LOGINS, *OTHERS, *(f"user {user}" for user in users)]
    missing = {name: secrets.token_urlsafe(64) for name in names if name not in base}
    if "fernet" not in base:
        missing["fernet"] = base64.urlsafe_b64encode(os.urandom(32)).decode()
    if missing:
        base |= missing
        write(file, json.dumps(base, indent=1))
    return base


def derived(
    base: Mapping[str, str], places: Mapping[str, str], users: list[str]
) -> dict[str, dict[str, str]]:
    """Return what each reader is told: the content of its files, by their names.

    :param places: addresses, by the names that the module's description lists.
    """
    broker = f"redis://:{base['redis']}@{places['BROKER']}"
    shared = {
        "broker_url": f"{broker}/0",
        "result_backend": f"{broker}/1",
        "api_secret_key": base["api"],
        "search_storage": database_url("searches", base, places["SEARCH_DATABASE"]),
        "ray_token": base.get(GIVEN, ""),
    }
    servers = {
        **shared,
        "database_url": database_url("airflow", base, places["AIRFLOW_DATABASE"]),
        "fernet_key": base["fernet"],
        "jwt_secret": base["jwt"],
        "connections.json": json.dumps(connections(base, places)),
    }
    mlflow = {
        "backend_store_uri": database_url("mlflow", base, places["MLFLOW_DATABASE"]),
        "flask_secret_key": base["mlflow_flask"],
        "auth.ini": auth_ini(base, places),
        "admin_password": base["mlflow_admin"],
    }
    return {
        "postgres": {"password": base["postgres"], **{name: base[name] for name in LOGINS}},
        "redis": {"password": base["redis"], "redis.conf": redis_conf(base)},
        "mlflow": mlflow,
        "servers": servers,
        "people": {"passwords.json": json.dumps({user: base[f"user {user}"] for user in users})},
        "workers": shared,
    }


def database_url(name: str, base: Mapping[str, str], place: str) -> str:
    """Return SQLAlchemy's URL of one of the databases."""
    return f"postgresql+psycopg2://{name}:{base[name]}@{place}/{name}"


def connections(base: Mapping[str, str], places: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return Airflow's connections to MLflow and to our own API, which ``admin`` calls."""
    extra = json.dumps({"public_url": places["MLFLOW_PUBLIC_URL"]})
    return {
        "mlflow_default": {
            "conn_type": "mlflow",
            "host": places["MLFLOW_URL"],
            "login": "admin",
            "password": base["mlflow_admin"],
            "extra": extra,
        },
        "post_training_default": {
            "conn_type": "post_training",
            "host": places["POST_TRAINING_URL"],
            "login": "admin",
            "password": base["user admin"],
        },
    }


def auth_ini(base: Mapping[str, str], places: Mapping[str, str]) -> str:
    """Return the configuration of MLflow's login; a login that was found right is so for a minute."""
    return f"""[mlflow]
default_permission = READ
database_uri = {database_url("mlflow", base, places["MLFLOW_DATABASE"])}
admin_username = admin
admin_password = {base["mlflow_admin"]}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


def redis_conf(base: Mapping[str, str]) -> str:
    """Return the part of Redis's configuration that holds its password, and what it keeps: every message."""
    return f"requirepass {base['redis']}\nappendonly yes\nmaxmemory-policy noeviction\n"


def write(file: Path, text: str, mode: int = 0o400) -> None:
    """Replace a file, which by default its owner alone may read."""
    draft = file.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as open_file:
        open_file.write(text)
    draft.replace(file)


def keep(name: str, file: Path, secret: str) -> None:
    """Put a secret into the base; what is derived from it follows at the next start.

    :raises ValueError: if there is no secret of that name, or it is empty.
    """
    known = [*LOGINS, *OTHERS, GIVEN, "fernet"]
    if name not in known and not name.startswith("user "):
        raise ValueError(f"a secret's name must be one of {', '.join(known)} or 'user NAME', got {name!r}")
    if not secret:
        raise ValueError(f"the secret {name} must not be empty")
    base = json.loads(file.read_text()) if file.exists() else {}
    write(file, json.dumps({**base, name: secret}, indent=1))


def refuse_foreign(folders: Mapping[str, Path]) -> None:
    """Refuse secrets that another base has made, as those that a machine of workers was given.

    :raises ValueError: naming one.
    """
    base = folders["base"] / BASE
    found = [file for reader, folder in folders.items() if reader != "base" for file in folder.iterdir()]
    if found and not base.exists():
        raise ValueError(
            f"{found[0].parent} must be empty where there is no {base}, got {found[0].name}: new"
            " secrets would replace those of another machine, whose workers compose.worker.yaml starts"
        )


def main() -> None:
    """Write all files into the folders that are named.

    :raises KeyError: if a reader's folder, or an address, is missing.
    """
    words = sys.argv[1:]
    try:
        if words[:1] == ["keep"]:
            keep(words[1], Path(words[2]) / BASE, sys.stdin.read().strip())
        else:
            write_all({reader: Path(folder) for reader, _, folder in (word.partition("=") for word in words)})
    except ValueError as error:
        sys.exit(str(error))


def write_all(folders: Mapping[str, Path]) -> None:
    """Write every reader's files.

    :raises ValueError: if nobody is to sign in as ``admin``, or a folder holds secrets of another machine.
    """
    users = [pair.partition(":")[0] for pair in os.environ["AIRFLOW_USERS"].split(",")]
    if "admin" not in users:
        raise ValueError(f"AIRFLOW_USERS must name admin, as whom the task reconcile signs in, got {users}")
    refuse_foreign(folders)
    base = keep_base(folders["base"] / BASE, users)
    for reader, files in derived(base, os.environ, users).items():
        for name, text in files.items():
            write(folders[reader] / name, text, MODES.get(reader, 0o400))


if __name__ == "__main__":
    main()
