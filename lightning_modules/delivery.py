"""How spooled events become requests to MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit, urlunsplit

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from lightning_modules.sender import RefusedError
from lightning_modules.spool import Event

MAX_METRICS_PER_REQUEST = 1000
MAX_DIGEST_CHARACTERS = 36
MAX_DATASET_NAME_CHARACTERS = 500
# A proxy without a server behind it answers 404 too; that is ENDPOINT_NOT_FOUND, and not final.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


class MLflowDelivery:
    """Sends events of one kind at a time to one run.

    May be repeated safely: MLflow keeps one point per (metric, step, time, value), one value
    per param and tag, and one input per data set and run. Hence the time of a point is the
    time at which it was spooled, never the time at which it is sent.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._senders: dict[str, Callable[[Sequence[Event]], None]] = {
            "metrics": self._metrics,
            "param": self._params,
            "tag": self._tags,
            "dataset": self._datasets,
        }

    def __call__(self, kind: str, events: Sequence[Event]) -> None:
        """Send the events.

        :raises RefusedError: if MLflow calls them invalid, or the run unknown.
        :raises Exception: anything else that a later try may overcome.
        """
        try:
            self._senders[kind](events)
        except MlflowException as error:
            if error.error_code in _REFUSALS:
                raise RefusedError(str(error)) from error
            raise

    def _metrics(self, events: Sequence[Event]) -> None:
        points = [
            Metric(key, math.nan if value is None else value, event["time"], event["step"])
            for event in events
            for key, value in event["values"].items()
        ]
        for first in range(0, len(points), MAX_METRICS_PER_REQUEST):
            batch = points[first : first + MAX_METRICS_PER_REQUEST]
            self._client.log_batch(self._run_id, metrics=batch, synchronous=True)

    def _params(self, events: Sequence[Event]) -> None:
        params = [Param(event["key"], event["value"]) for event in events]
        self._client.log_batch(self._run_id, params=params, synchronous=True)

    def _tags(self, events: Sequence[Event]) -> None:
        newest = {event["key"]: event["value"] for event in events}
        tags = [RunTag(key, value) for key, value in newest.items()]
        self._client.log_batch(self._run_id, tags=tags, synchronous=True)

    def _datasets(self, events: Sequence[Event]) -> None:
        self._client.log_inputs(self._run_id, datasets=[_dataset_input(event) for event in events])


def _dataset_input(event: Event) -> DatasetInput:
    source_type, source = describe_source(event["source"])
    dataset = Dataset(
        name=_public_name(event["name"])[:MAX_DATASET_NAME_CHARACTERS],
        digest=event["digest"][:MAX_DIGEST_CHARACTERS],
        source_type=source_type,
        source=json.dumps(source),
        profile=json.dumps({"num_rows": event["rows"], "sha256": event["digest"]}),
    )
    return DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, event["context"])])


def _public_name(name: str) -> str:
    """A data set without an id is named by its URI, which may hold a password or the data."""
    if name.startswith("data:") or "://" in name:
        return next(iter(describe_source(name)[1].values()))
    return name


def describe_source(source: str) -> tuple[str, dict[str, str]]:
    """Reduce a path or URI to MLflow's source type and fields, without secrets or inline data."""
    parts = urlsplit(source)
    if parts.scheme in ("", "file"):
        return "local", {"uri": parts.path or source}
    if parts.scheme == "data":
        return "data", {"uri": f"{source.partition(',')[0]},..."}
    host = parts.netloc.rpartition("@")[2]
    if parts.scheme in ("http", "https"):  # a signed URL carries its key in the query
        return "http", {"url": urlunsplit((parts.scheme, host, parts.path, "", ""))}
    return parts.scheme, {"uri": urlunsplit((parts.scheme, host, parts.path, parts.query, ""))}
