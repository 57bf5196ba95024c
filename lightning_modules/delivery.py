"""How spooled events become requests to MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from lightning_modules.data.naming import address, describe_source, public_name
from lightning_modules.fencing import RunFence
from lightning_modules.figures import FIGURES
from lightning_modules.sender import RefusedError
from lightning_modules.spool import Event
from lightning_modules.tables import TABLES, upload_tables

MAX_METRICS_PER_REQUEST = 1000
MAX_DIGEST_CHARACTERS = 36
MAX_DATASET_NAME_CHARACTERS = 500
# A proxy without a server behind it answers 404 too; that is ENDPOINT_NOT_FOUND, and not final.
# BAD_REQUEST is not: MLflow says it too where two calls write the same point in the same moment.
UNKNOWN_RUN = "RESOURCE_DOES_NOT_EXIST"
INVALID = "INVALID_PARAMETER_VALUE"


class MLflowDelivery:
    """Sends events of one kind at a time to one run.

    May be repeated safely: MLflow keeps one point per (metric, step, time, value), one value
    per param and tag, one input per data set and run, and one file per table. Hence the time of
    a point is the time at which it was spooled, never the time at which it is sent.

    :param folder: the job's, where the files of tables and pictures are.
    :param fence: whether this attempt may write.
    """

    def __init__(self, client: MlflowClient, run_id: str, folder: Path, fence: RunFence) -> None:
        self._client = client
        self._run_id = run_id
        self._folder = folder
        self._fence = fence
        self._known_steps: dict[str, int] = {}
        self._known_before = 0
        self._senders: dict[str, Callable[[Sequence[Event]], None]] = {
            "metrics": self._metrics,
            "param": self._params,
            "tag": self._tags,
            "untag": self._untags,
            "dataset": self._datasets,
            "table": self._tables,
            "figure": self._figures,
        }

    def leave_out(self, known_steps: Mapping[str, int], before: int) -> None:
        """Leave out the points up to these steps that were spooled before this attempt.

        An attempt elsewhere has recorded them meanwhile, or they arrived and only the answer was lost.

        :param known_steps: last step of each metric that the run has.
        :param before: when this attempt began, in milliseconds since the epoch.
        """
        self._known_steps, self._known_before = dict(known_steps), before

    def __call__(self, kind: str, events: Sequence[Event]) -> None:
        """Send the events.

        :raises RefusedError: if MLflow calls them invalid, or the run unknown; not while the run is deleted,
            which MLflow calls invalid too: it may be restored.
        :raises SupersededError: if a newer attempt has taken over.
        :raises Exception: anything else that a later try may overcome.
        """
        try:
            self._fence.check()
            self._senders[kind](events)
        except MlflowException as error:
            if error.error_code == UNKNOWN_RUN or (error.error_code == INVALID and self._is_active()):
                raise RefusedError(str(error)) from error
            raise

    def _is_active(self) -> bool:
        return bool(self._client.get_run(self._run_id).info.lifecycle_stage == LifecycleStage.ACTIVE)

    def _metrics(self, events: Sequence[Event]) -> None:
        points = [
            Metric(key, math.nan if value is None else value, event["time"], event["step"])
            for event in events
            for key, value in event["values"].items()
            if event["time"] >= self._known_before or event["step"] > self._known_steps.get(key, -1)
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

    def _untags(self, events: Sequence[Event]) -> None:
        there = self._tags_now()  # to delete one that is not there is an error
        for key in {event["key"] for event in events} & there.keys():
            self._client.delete_tag(self._run_id, key)

    def _datasets(self, events: Sequence[Event]) -> None:
        self._client.log_inputs(self._run_id, datasets=[_dataset_input(event) for event in events])

    def _tables(self, events: Sequence[Event]) -> None:
        names = list(dict.fromkeys(event["name"] for event in events))
        upload_tables(self._client, self._run_id, self._folder / TABLES, names)

    def _figures(self, events: Sequence[Event]) -> None:
        for name in dict.fromkeys(event["name"] for event in events):
            self._client.log_artifact(self._run_id, str(self._folder / FIGURES / name), FIGURES)

    def _tags_now(self) -> dict[str, str]:
        return dict(self._client.get_run(self._run_id).data.tags)


def _dataset_input(event: Event) -> DatasetInput:
    source_type, source = describe_source(event["source"])
    # MLflow's page shows every entry of the profile, and the source only where it knows the type.
    profile = {"num_rows": event["rows"], "sha256": event["digest"], "source": address(source)}
    dataset = Dataset(
        name=public_name(event["name"])[:MAX_DATASET_NAME_CHARACTERS],
        digest=event["digest"][:MAX_DIGEST_CHARACTERS],
        source_type=source_type,
        source=json.dumps(source),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, tags=[InputTag(MLFLOW_DATASET_CONTEXT, event["context"])])
