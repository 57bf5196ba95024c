"""Make the databases of a cluster: ``python databases.py SECRETS HOST:PORT``.

``SECRETS`` holds the superuser's ``password``, and beside it one file for each database, named as the
database and its role, with the role's password, which is set again at each start.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import psycopg2  # type: ignore[import-untyped]
from psycopg2 import sql


def make_databases(folder: Path, place: str) -> None:
    """Make what is missing, and set each role's password."""
    passwords = {file.name: file.read_text() for file in folder.iterdir() if file.suffix != ".tmp"}
    url = f"postgresql://postgres:{passwords.pop('password')}@{place}/postgres"
    with closing(psycopg2.connect(url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for name, password in passwords.items():
                role = sql.Identifier(name)
                cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [name])
                verb = sql.SQL("ALTER" if cursor.fetchone() else "CREATE")
                login = sql.SQL("{} ROLE {} LOGIN PASSWORD {}")
                cursor.execute(login.format(verb, role, sql.Literal(password)))
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
                if not cursor.fetchone():
                    cursor.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(role, role))
                    cursor.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(role))


if __name__ == "__main__":
    make_databases(Path(sys.argv[1]), sys.argv[2])
