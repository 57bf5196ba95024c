"""Many MLflow runs at once, for pages: few calls, whatever the number of jobs that are shown."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from post_training.errors import RecordUnavailableError
from post_training.schemas import record as names
from post_training.tracking import JobRun, Tracking, answers, is_run_id, job_run

MAX_RUNS = 100
"""As many runs as MLflow gives the curves of in one call."""

_CURVES = "/api/2.0/mlflow/metrics/get-history-bulk-interval"
"""MLflow's own pages draw from it: of each run it answers so many points, spread over all steps. Its client
has no method for it."""

Curve = tuple[list[int], list[float]]
"""Steps, ascending, and the values there."""


class RunReader:
    """Reads runs. Every method raises RecordUnavailableError when MLflow fails.

    :param tracking: the tracking server.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def by_id(self, run_ids: Collection[str]) -> list[JobRun]:
        """Return the runs of these ids, in no order; of those that are none, nothing.

        :param run_ids: at most ``MAX_RUNS``; they come from DAG runs' confs, in which anything may stand.
        """
        known = sorted(filter(is_run_id, run_ids))[:MAX_RUNS]
        return self._search(f"attributes.run_id IN ({_quoted(known)})") if known else []

    def of_dag(self, dag_id: str, since: datetime, until: datetime) -> list[JobRun]:
        """Return the runs of a DAG's jobs that were made in a time, the newest ``MAX_RUNS``."""
        milliseconds = [int(moment.timestamp() * 1000) for moment in (since, until)]
        return self._search(
            f"tags.`{names.TAG_DAG_ID}` = '{dag_id}' AND attributes.start_time >= {milliseconds[0]}"
            f" AND attributes.start_time <= {milliseconds[1]} AND tags.`{names.TAG_STAGE}` IS NULL"
        )

    def _search(self, wanted: str) -> list[JobRun]:
        with answers():
            found = self._tracking.client.search_runs(
                self._tracking.experiment_ids(), wanted, max_results=MAX_RUNS
            )
        return [job_run(run) for run in found]

    def curves(self, run_ids: Sequence[str], metric: str, points: int) -> dict[str, Curve]:
        """Return one metric of several runs by run id; runs that do not have it are left out.

        Of a step that was trained twice, by two attempts, the later value counts.

        :param run_ids: at most ``MAX_RUNS``.
        :param points: largest number of points of each run.
        """
        from mlflow.utils.rest_utils import http_request, verify_rest_response

        arguments = [
            *(("run_ids", run_id) for run_id in run_ids),
            ("metric_key", metric),
            ("max_results", str(points)),
        ]
        with answers():
            store = self._tracking.client._tracking_client.store
            creds = store.get_host_creds()
            answer = http_request(creds, _CURVES, "GET", params=arguments)  # type: ignore[no-untyped-call]
            found = verify_rest_response(answer, _CURVES).json().get("metrics", [])
        return _curves(found)

    def request(self, run: JobRun) -> dict[str, Any]:
        """Return the request that the run was made for, without keys in addresses.

        :raises RecordUnavailableError: also where the run does not hold it.
        """
        with TemporaryDirectory() as folder, answers():
            path = self._tracking.client.download_artifacts(run.run_id, names.ARTIFACT_REQUEST, folder)
            text = Path(path).read_text(encoding="utf-8")
        body = json.loads(text)
        if not isinstance(body, dict):
            raise RecordUnavailableError(f"MLflow run {run.run_id} holds no request")
        return body


def _quoted(run_ids: Collection[str]) -> str:
    return ", ".join(f"'{run_id}'" for run_id in run_ids)


def _curves(metrics: list[dict[str, Any]]) -> dict[str, Curve]:
    values: dict[str, dict[int, float]] = {}
    for metric in sorted(metrics, key=lambda metric: int(metric.get("timestamp", 0))):
        value = float(metric["value"])  # NaN and Infinity are text in MLflow's JSON
        if math.isfinite(value):
            values.setdefault(metric["run_id"], {})[int(metric.get("step", 0))] = value
    return {
        run_id: (steps := sorted(by_step), [by_step[step] for step in steps])
        for run_id, by_step in values.items()
    }
