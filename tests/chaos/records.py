"""What a job has left in MLflow, in a form that two jobs can be compared by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, Run, ViewType
from safetensors import safe_open

from post_training.schemas import record as names

CLOCKED = frozenset(
    {names.METRIC_TOKENS_PER_SECOND, names.METRIC_SECONDS_LEFT, names.METRIC_PEAK_MEMORY_BYTES}
)
"""Metrics that tell the time, or a process's memory: their steps are compared, their values are not."""

OF_THE_MACHINE = frozenset(
    {
        names.METRIC_DEVICE_SECONDS,
        names.METRIC_JOB_TOKENS,
        names.METRIC_ESTIMATED_MEMORY_BYTES,
        names.METRIC_ESTIMATED_SECONDS,
    }
)
"""Metrics that are not compared: what all attempts used, killed ones too, and guesses from measurements."""

Series = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Trained:
    """The outcome of a completed job.

    :param weights: SHA-256 over the tensors of its last checkpoint.
    :param series: each metric's points, ordered by step; the values of ``CLOCKED`` are 0.
    """

    weights: str
    series: Series


class Records:
    """All jobs' runs in a tracking server."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client = MlflowClient(uri)

    def runs(self) -> Iterator[Run]:
        """Every run of a job, deleted ones too."""
        experiments = [e.experiment_id for e in self._client.search_experiments(view_type=ViewType.ALL)]
        token = None
        while True:
            page = self._client.search_runs(experiments, run_view_type=ViewType.ALL, page_token=token)
            yield from (run for run in page if names.TAG_JOB_UUID in run.data.tags)
            token = page.token
            if not token:
                return

    def checkpoints(self, run: Run) -> list[LoggedModel]:
        """The logged models that a run made, whatever their state."""
        condition = f"source_run_id = '{run.info.run_id}'"
        return list(self._client.search_logged_models([run.info.experiment_id], condition, max_results=100))

    def trained(self, run: Run, checkpoint: str) -> Trained:
        """Return what a run's training came to.

        :param checkpoint: ``models:/…`` of its last checkpoint.
        """
        keys = sorted(run.data.metrics.keys() - OF_THE_MACHINE)
        return Trained(self._weights(checkpoint), {key: self._points(run, key) for key in keys})

    def _points(self, run: Run, key: str) -> list[tuple[int, float]]:
        points = self._client.get_metric_history(run.info.run_id, key)
        return sorted((point.step, 0.0 if key in CLOCKED else point.value) for point in points)

    def _weights(self, checkpoint: str) -> str:
        digest = hashlib.sha256()
        location = self._client.get_logged_model(checkpoint.removeprefix("models:/")).artifact_location
        with TemporaryDirectory() as folder:
            download_artifacts(location, dst_path=folder, tracking_uri=self._uri)
            for file in sorted(Path(folder).rglob("*.safetensors")):
                with safe_open(file, framework="numpy") as tensors:
                    for name in sorted(tensors.keys()):
                        tensor = tensors.get_tensor(name)
                        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                        digest.update(tensor.tobytes())
        return digest.hexdigest()
