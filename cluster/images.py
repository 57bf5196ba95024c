"""What this machine runs in place of an image: programs that Debian and PyPI have."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AIRFLOW_HOME, LOGS = "/opt/airflow", "/var/log/airflow"
OURS = {"/opt/init": ROOT / "docker" / "init", f"{AIRFLOW_HOME}/dags": ROOT / "dags"}
"""Where our images, as docker/Dockerfile makes them, have folders of the checkout."""

_AS_NOBODY_SPECIAL = ("unshare", "--map-user=1000", "--map-group=1000")
_PACKAGES = {"initdb": "postgresql", "redis-server": "redis-server"}
_POSTGRES_VERSIONS = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Start:
    """What starts a service's process.

    :param prepare: commands that are run to their ends before.
    """

    command: tuple[str, ...]
    prepare: tuple[tuple[str, ...], ...] = ()


def is_ours(image: str) -> bool:
    """Whether the image is built by us."""
    return image.startswith("post-training-")


def image_paths(image: str, folder: Path) -> dict[str, Path]:
    """Return what lies where in an image.

    :param folder: of this service alone.
    """
    if not is_ours(image):
        return {}
    return {**OURS, AIRFLOW_HOME: folder / "airflow", LOGS: folder / "logs"}


def image_environment(image: str, folder: Path) -> dict[str, str]:
    """Return the variables that an image sets: those of docker/Dockerfile."""
    if not is_ours(image):
        return {}
    sources = [str(ROOT / "plugins"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "AIRFLOW_HOME": str(folder / "airflow"),
        "PYTHONPATH": os.pathsep.join(sources),
        "PYTHONUNBUFFERED": "1",
        # The name of this machine is not the service's; images keep the default.
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "cluster.hosts.host_name",
    }


def search_path() -> str:
    """Return the folders in which programs are looked for."""
    versions = sorted(_POSTGRES_VERSIONS.glob("*/bin"), key=lambda folder: int(folder.parent.name))
    folders = [Path(sys.executable).parent, *reversed(versions)]
    return os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])


def missing_packages() -> list[str]:
    """Return the packages of Debian that are not installed and must be."""
    return [name for program, name in _PACKAGES.items() if shutil.which(program, path=search_path()) is None]


def start_of(
    image: str, command: Sequence[str], environment: Mapping[str, str], volumes: Mapping[str, Path]
) -> Start:
    """Return what an image's entry point does with a command.

    :param environment: of the process.
    :param volumes: folders of this machine, by where the image has them.
    :raises ValueError: if nothing here stands for the image.
    """
    name = image.partition(":")[0]
    if is_ours(image) or name == "redis":
        return Start(tuple(command))
    if name == "postgres":
        return _postgres(command, environment, volumes["/var/lib/postgresql/data"])
    raise ValueError(f"no program of this machine stands for the image {image!r}")


def _postgres(command: Sequence[str], environment: Mapping[str, str], data: Path) -> Start:
    """Make an empty data folder ready, as the image does.

    PostgreSQL does not run as root. A user namespace lets it be somebody else in folders that are root's.

    :raises RuntimeError: if there is no user namespace for root.
    """
    prefix = _AS_NOBODY_SPECIAL if os.geteuid() == 0 else ()
    if prefix and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:  # noqa: S603
        raise RuntimeError(
            "PostgreSQL does not run as root, and this kernel gives root no user namespace:"
            " start the cluster as another user"
        )
    program, *arguments = command
    own = ("-D", str(data), "-c", "unix_socket_directories=")
    start = (*prefix, program, *own, *arguments)
    if (data / "PG_VERSION").exists():
        return Start(start)
    password = ("--pwfile", environment["POSTGRES_PASSWORD_FILE"])
    options = ("-U", "postgres", *password, *environment["POSTGRES_INITDB_ARGS"].split())
    everybody = f"echo host all all all scram-sha-256 >> '{data}/pg_hba.conf'"
    return Start(start, ((*prefix, "initdb", "-D", str(data), *options), ("sh", "-c", everybody)))
