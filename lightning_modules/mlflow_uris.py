"""Where one given MLflow server keeps what a ``models:``, ``runs:`` or ``mlflow-artifacts:`` URI names.

Asked to download the first two by themselves, MLflow 3.17 looks them up on its process-wide default server,
whatever tracking URI it is given, and makes a database in the working folder for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from post_training.errors import ModelError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

MODEL_ID = re.compile(r"m-[0-9a-f]{32}")


def resolve(client: MlflowClient, uri: str) -> tuple[str, str]:
    """Find what a URI names.

    :param uri: ``models:/MODEL_ID``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``, ``runs:/RUN_ID`` or
        ``mlflow-artifacts:``, each with a path behind it or none; without a host.
    :returns: the URI with an alias replaced by the version that it names now, and the place of the files: an
        ``mlflow-artifacts:`` URI, an object store's, or a path on a disk that the server's clients share.
    :raises ModelError: if a logged model is not complete.
    :raises Exception: whatever MLflow's client raises.
    """
    name, location = _look_up(client, uri)
    if urlsplit(location).scheme == "runs":  # a version that was registered from a run's artifact
        _, location = _look_up(client, location)
    return name, location


def _look_up(client: MlflowClient, uri: str) -> tuple[str, str]:
    scheme, _, path = uri.partition(":")
    return LOOKUPS[scheme](client, path.strip("/"))


def _model(client: MlflowClient, path: str) -> tuple[str, str]:
    first, _, rest = path.partition("/")
    if MODEL_ID.fullmatch(first):
        return f"models:/{path}", _join(_complete(client.get_logged_model(first)), rest)
    name, at, alias = first.rpartition("@")
    if at:
        version = str(client.get_model_version_by_alias(name, alias).version)
    else:
        name = first
        version, _, rest = rest.partition("/")
    location = client.get_model_version_download_uri(name, version)
    return _join(f"models:/{name}/{version}", rest), _join(location, rest)


def _run(client: MlflowClient, path: str) -> tuple[str, str]:
    """Find a logged model of the run by its name, as MLflow itself does, or a run's own artifact."""
    run_id, _, rest = path.partition("/")
    run, (name, _, inside) = client.get_run(run_id), rest.partition("/")
    models = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}' AND name = '{_quoted(name)}'"
    )
    location = _join(_complete(models[0]), inside) if models else _join(run.info.artifact_uri, rest)
    return f"runs:/{path}", location


def _artifact(client: MlflowClient, path: str) -> tuple[str, str]:
    return f"mlflow-artifacts:/{path}", f"mlflow-artifacts:/{path}"


LOOKUPS: Mapping[str, Callable[[MlflowClient, str], tuple[str, str]]] = {
    "models": _model,
    "runs": _run,
    "mlflow-artifacts": _artifact,
}
"""For each scheme, what finds a path's name and place."""


def _complete(model: LoggedModel) -> str:
    if model.status.value != "READY":
        raise ModelError(f"the logged model {model.model_id} in MLflow is {model.status.value}, not READY")
    return str(model.artifact_location)


def _join(*parts: str) -> str:
    return "/".join(part.rstrip("/") for part in parts if part)


def _quoted(name: str) -> str:
    return name.replace("'", "")  # no model's name holds one
