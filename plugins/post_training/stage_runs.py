"""MLflow runs of tasks that are no jobs: what a retraining prepares, evaluates and decides."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from post_training.errors import DataError
from post_training.job_ids import TaskKey, job_uuid_of
from post_training.schemas import record as names
from post_training.tracking import JobRun, Tracking, answers


class StageRuns:
    """Finds or makes such runs. Every method raises RecordUnavailableError when MLflow fails.

    :param tracking: the tracking server.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def open(
        self,
        key: TaskKey,
        *,
        experiment: str | None = None,
        parent: str | None = None,
        name: str | None = None,
        part: str | None = None,
        further: Mapping[str, str] | None = None,
    ) -> JobRun:
        """Return the task's run, RUNNING: the one of an attempt before, or a new one.

        :param experiment: its name; None is the server's default.
        :param parent: id of the run that it is shown below.
        :param name: None is the task's place in Airflow.
        :param part: of the task's work that has a run of its own.
        :param further: tags of a new one.
        """
        run = self.find(key, part)
        if run is not None:
            self._tracking.set_status(run.run_id, "RUNNING")
            going_on = {name: value for name, value in run.tags.items() if name != names.TAG_ERROR}
            return replace(run, status="RUNNING", ended_at=None, tags=going_on)
        tags = {
            names.TAG_STAGE: place_digest(key, part),
            names.TAG_DAG_ID: key.dag_id,
            names.TAG_RUN_ID: key.run_id,
            names.TAG_TASK_ID: key.task_id,
            names.TAG_MAP_INDEX: str(key.map_index),
            **(further or {}),
        }
        if self._tracking.server.deployment:
            tags[names.TAG_DEPLOYMENT] = self._tracking.server.deployment
        if parent is not None:
            tags[names.TAG_PARENT_RUN] = parent
        client = self._tracking.client
        with answers("experiment_name"):
            found = self._tracking.experiment_for(experiment)
            made = client.create_run(found.experiment_id, tags=tags, run_name=name or job_uuid_of(key))
        opened = self._tracking.get(made.info.run_id)
        assert opened is not None, "it was made just now"  # noqa: S101
        return opened

    def find(self, key: TaskKey, part: str | None = None) -> JobRun | None:
        """Return the task's run, None where it has none yet; of one that has several, that of a part."""
        return next(self._tracking.tagged(names.TAG_STAGE, place_digest(key, part)), None)

    def children(self, run_id: str) -> list[JobRun]:
        """Return the runs that are shown below another, oldest first."""
        return list(reversed(list(self._tracking.tagged(names.TAG_PARENT_RUN, run_id))))

    def log_table(self, run_id: str, file: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Write a table that MLflow's pages show, instead of the one before; numbers not finite become null.

        Source: ``MlflowClient.log_table``, which would append to the one before.
        """
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        data = [[None if _is_not_finite(value) else value for value in row] for row in rows]
        entry = {"path": file, "type": "table"}
        client = self._tracking.client
        with answers():
            client.log_dict(run_id, {"columns": columns, "data": data}, file)
            listed = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
            if entry not in listed:
                client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Write values that do not change any more."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        with answers():
            points = [Metric(name, value, now, 0) for name, value in metrics.items()]
            self._tracking.client.log_batch(run_id, metrics=points)

    def read(self, run_id: str, file: str) -> bytes:
        """Return what a file among the run's artifacts holds.

        :param file: not in a folder.
        :raises DataError: if there is no such run or file.
        """
        with answers(), TemporaryDirectory() as folder:
            run = self._tracking.get(run_id)
            files = self._tracking.client.list_artifacts(run_id) if run is not None else []
            if file not in [one.path for one in files]:
                raise DataError(f"the MLflow run {run_id!r} has no {file}")
            return Path(self._tracking.client.download_artifacts(run_id, file, folder)).read_bytes()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def place_digest(key: TaskKey, part: str | None = None) -> str:
    """Return a task's place as MLflow's filter language can hold it, whatever its names are made of."""
    place = [*astuple(key), *([part] if part is not None else [])]
    return hashlib.sha256(json.dumps(place).encode()).hexdigest()
