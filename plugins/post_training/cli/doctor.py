"""The command that looks whether this machine and its deployment can train, and says what to mend."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil  # type: ignore[import-untyped]
from packaging.requirements import Requirement

from post_training import __version__
from post_training.cli.deployment import Options, connect, find_servers
from post_training.cli.exits import ExitCode
from post_training.cli.output import print_json, print_table, size
from post_training.client import MOUNT, PostTrainingClient
from post_training.errors import ForbiddenError, PostTrainingError, RecordUnavailableError
from post_training.launch.local import tcmalloc
from post_training.standalone import Standalone

DISTRIBUTION = "airflow-provider-post-training"
SHOWN = ("apache-airflow-core", "mlflow-skinny", "torch", "lightning", "transformers", "peft")
"""Distributions whose versions are told where they are installed."""

AIRFLOW_CONFIG = Path("airflow", "airflow.cfg")
"""Below the user's home: what Airflow reads where ``AIRFLOW_HOME`` names no other folder."""

LITTLE_DISK, NO_DISK = 10 * 2**30, 2**30
"""Bytes: below the first a checkpoint of a larger model may not fit, below the second hardly any does."""

LITTLE_MEMORY = 2 * 2**30
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
PROBE_SECONDS = 120.0
_PROBE = """
import json, torch
cuda = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
print(json.dumps([[device.name, device.total_memory] for device in cuda]))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    :param state: a warning stops nothing, a failure does.
    :param remedy: what to do about it.
    """

    name: str
    state: Literal["ok", "warning", "failure"]
    found: str
    remedy: str | None = None


@dataclass(frozen=True)
class Connections:
    """Ids of the connections by which tasks reach MLflow and the API."""

    mlflow: str
    post_training: str


@dataclass(frozen=True)
class Place:
    """What this machine knows of the deployment.

    :param allowed_roots: None is not known here.
    :param python: the trainer's interpreter.
    :param connections: those of tasks; None where there is no Airflow.
    """

    home: Path
    allowed_roots: tuple[Path, ...] | None
    python: str
    mlflow: str | None
    connections: Connections | None = None


def doctor(options: Options, *, tracking_uri: str | None, as_json: bool) -> ExitCode:
    """Print what is found; the code says whether a check failed.

    :param options: which deployment is meant.
    :param tracking_uri: MLflow's, where no standalone servers say it.
    """
    checks = list(all_checks(options, tracking_uri))
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        print_table(
            ("", "check", "found", "what to do"),
            ((check.state, check.name, check.found, check.remedy) for check in checks),
        )
    failed = any(check.state == "failure" for check in checks)
    return ExitCode.FAILED if failed else ExitCode.OK


def all_checks(options: Options, tracking_uri: str | None) -> Iterator[Check]:
    """Yield every check."""
    try:
        place = place_of(options, tracking_uri, os.environ)
    except ValueError as error:
        yield Check("settings", "failure", str(error), "correct it in airflow.cfg, or in its variable")
        place = place_of(options, tracking_uri, {})
    yield from versions()
    yield devices(place.python)
    yield memory()
    yield disk(place.home)
    yield from roots(place.allowed_roots)
    yield from api(options)
    if place.connections is not None:
        yield from connections(place.connections)
    if place.connections is None or place.mlflow is not None:
        yield mlflow(place.mlflow)


def place_of(options: Options, tracking_uri: str | None, environment: Mapping[str, str]) -> Place:
    """Return what standalone servers say of themselves, else Airflow's settings where there are any."""
    servers: Standalone | None = None
    with suppress(PostTrainingError):  # the API's check tells of it
        servers = find_servers(options.home) if options.url is None else None
    if servers is not None:
        layout = servers.layout
        return Place(layout.home, layout.allowed_roots, sys.executable, tracking_uri or layout.mlflow_url)
    if _has_airflow(environment):
        from post_training.settings import load_settings  # noqa: PLC0415 - it imports Airflow

        settings = load_settings()
        ids = Connections(settings.mlflow_conn_id, settings.post_training_conn_id)
        return Place(settings.home, settings.allowed_roots, settings.trainer_python, tracking_uri, ids)
    return Place(Path.cwd(), None, sys.executable, tracking_uri)


def _has_airflow(environment: Mapping[str, str]) -> bool:
    """Whether Airflow is told something here, by a variable or by the file of its default home."""
    file = Path(environment["HOME"], AIRFLOW_CONFIG) if environment.get("HOME") else None
    return any(name.startswith("AIRFLOW_") for name in environment) or (file is not None and file.is_file())


def versions() -> Iterator[Check]:
    """Look at the versions of what is installed, and at what our own package wants of them."""
    installed = {name: version for name in SHOWN if (version := _version(name)) is not None}
    found = {"post_training": __version__, "python": platform.python_version(), **installed}
    yield Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))
    try:
        required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        yield Check("packages", "warning", "not installed: it runs from its sources", "pip install .")
        return
    for extra in ("", "train", "search"):
        yield _packages(required, extra)


def _packages(required: list[Requirement], extra: str) -> Check:
    """Say whether what an extra requires is installed; the empty one is what all need."""
    of_extra = [each for each in required if _belongs(each, extra)]
    unmet = [text for each in of_extra if (text := _unmet(each)) is not None]
    name = f"packages of [{extra}]" if extra else "packages"
    if not unmet:
        return Check(name, "ok", f"all {len(of_extra)} as required")
    wanted = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
    return Check(name, "warning" if extra else "failure", ", ".join(unmet), f"pip install '{wanted}'")


def _belongs(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return not extra
    return requirement.marker.evaluate({"extra": extra}) and "extra" in str(requirement.marker)


def _unmet(requirement: Requirement) -> str | None:
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, not {requirement.specifier}"
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices(python: str) -> Check:
    """Ask the trainer's interpreter for its GPUs."""
    cores = f"{psutil.cpu_count()} cores"
    try:
        probe = subprocess.run(  # noqa: S603
            [python, "-c", _PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("devices", "failure", f"{python}: {error}", "set [post_training] trainer_python")
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no reason is given"])[-1]
        return Check("devices", "warning", f"{cores}; {last}", f"pip install '{DISTRIBUTION}[train]'")
    gpus = [f"{name} ({size(memory)})" for name, memory in json.loads(probe.stdout.splitlines()[-1])]
    if not gpus and tcmalloc() is None:
        remedy = "apt-get install libtcmalloc-minimal4: a sixth less memory, a tenth more speed"
        return Check("devices", "warning", f"{cores}, no GPU, no tcmalloc", remedy)
    return Check("devices", "ok", f"{cores}, {', '.join(gpus) or 'no GPU'}")


def memory() -> Check:
    """Look at the memory that is free."""
    free = psutil.virtual_memory()
    found = f"{size(free.available)} of {size(free.total)} free"
    if free.available < LITTLE_MEMORY:
        return Check("memory", "warning", found, "end other processes, or train elsewhere")
    return Check("memory", "ok", found)


def disk(home: Path) -> Check:
    """Look at the disk that jobs write to."""
    folder = next(path for path in (home.resolve(), *home.resolve().parents) if path.exists())
    usage = shutil.disk_usage(folder)
    found = f"{size(usage.free)} of {size(usage.total)} free at {home}"
    if usage.free >= LITTLE_DISK:
        return Check("disk", "ok", found)
    state: Literal["warning", "failure"] = "failure" if usage.free < NO_DISK else "warning"
    return Check("disk", state, found, "delete what lies there in the folders jobs/DAG/RUN of ended jobs")


def roots(allowed: tuple[Path, ...] | None) -> Iterator[Check]:
    """Look whether the folders are there from which requests may read."""
    if allowed is None:
        yield Check("allowed roots", "ok", "not known here: the deployment's, or for `run` every folder")
        return
    if not allowed:
        yield Check(
            "allowed roots",
            "warning",
            "none: requests may name no file",
            "post-training up --allowed-root, or [post_training] allowed_roots",
        )
    for root in allowed:
        if root.is_dir() and os.access(root, os.R_OK | os.X_OK):
            yield Check("allowed roots", "ok", str(root))
        else:
            yield Check(
                "allowed roots",
                "failure",
                f"{root} is no folder that can be read",
                "make it, or leave it out",
            )


def api(options: Options) -> Iterator[Check]:
    """Call the API, and look at Airflow's health."""
    try:
        client = connect(options)
    except PostTrainingError as error:
        remedy = "post-training up" if isinstance(error, RecordUnavailableError) else None
        yield Check("API", "warning" if options == Options() else "failure", str(error), remedy)
        return
    yield _jobs_of(client)
    yield from _airflow(client.url.removesuffix(MOUNT))


def _jobs_of(client: PostTrainingClient) -> Check:
    try:
        count = len(client.list_jobs().data)
    except ForbiddenError as error:
        remedy = "set POST_TRAINING_TOKEN, or POST_TRAINING_USER and POST_TRAINING_PASSWORD"
        return Check("API", "failure", f"{client.url}: {error}", remedy)
    except PostTrainingError as error:
        return Check(
            "API", "failure", f"{client.url}: {error}", "look into the api-server's log, check --url"
        )
    return Check("API", "ok", f"{client.url}: {count} jobs")


def _airflow(url: str) -> Iterator[Check]:
    """Yield how each of Airflow's components is."""
    try:
        parts: dict[str, Any] = (
            httpx.get(f"{url}/api/v2/monitor/health", timeout=TIMEOUT).raise_for_status().json()
        )
    except (httpx.HTTPError, ValueError) as error:
        yield Check("Airflow", "failure", f"{url}: {error}", "start the api-server")
        return
    for name, part in parts.items():
        yield _component(name, part.get("status"))


def _component(name: str, health: str | None) -> Check:
    """Say how one of Airflow's components is.

    :param health: None of one that has never run.
    """
    if health == "healthy":
        return Check("Airflow", "ok", f"{name} is healthy")
    found = f"{name} {'has never run' if health is None else f'is {health}'}"
    if name == "metadatabase":
        return Check("Airflow", "failure", found, "airflow db check, on the api-server's machine")
    never_needed = name == "triggerer" and health is None  # only tasks that are deferred wait for it
    remedy = f"start it: airflow {name.replace('_', '-')}"
    return Check("Airflow", "warning" if never_needed else "failure", found, remedy)


def connections(ids: Connections) -> Iterator[Check]:
    """Use the connections of tasks, where this machine knows them."""
    from airflow.sdk.exceptions import AirflowNotFoundException  # noqa: PLC0415

    from post_training.operators.hooks import MLflowHook, PostTrainingHook  # noqa: PLC0415

    # Else the hooks ask environment and secrets backends alone, and not Airflow's database.
    os.environ.setdefault("_AIRFLOW_PROCESS_CONTEXT", "server")
    for hook, conn_id in (
        (MLflowHook(ids.mlflow), ids.mlflow),
        (PostTrainingHook(ids.post_training), ids.post_training),
    ):
        name = f"connection {conn_id}"
        try:
            answers, found = hook.test_connection()
        except AirflowNotFoundException:
            remedy = f"airflow connections add {conn_id}; a worker gets it from the api-server"
            yield Check(name, "warning", "not known on this machine", remedy)
        except ValueError as error:
            yield Check(name, "failure", str(error), "correct it")
        else:
            yield Check(name, "ok", found) if answers else Check(name, "failure", found, "correct it")


def mlflow(uri: str | None) -> Check:
    """Ask the tracking server whether it is there."""
    if uri is None:
        return Check("MLflow", "ok", "no tracking URI: `run` records in its folder", None)
    if not uri.startswith(("http://", "https://")):
        return Check("MLflow", "ok", f"{uri}: a store, no server")
    try:
        answer = httpx.get(f"{uri.rstrip('/')}/health", timeout=TIMEOUT)
    except httpx.HTTPError as error:
        return Check("MLflow", "failure", f"{uri}: {error}", "start it, or correct the tracking URI")
    if not answer.is_success:
        return Check("MLflow", "failure", f"{uri} answers {answer.status_code}", "look into its log")
    return Check("MLflow", "ok", uri)
