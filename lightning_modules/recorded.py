"""What a job's MLflow run holds already when an attempt begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient

from post_training.schemas.record import TAG_INPUTS


@dataclass(frozen=True)
class Recorded:
    """What a run holds of the attempts before.

    :param steps: last step of each metric.
    :param tags: values by key.
    :param points: finite values of each metric by step.
    """

    steps: Mapping[str, int] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @property
    def inputs(self) -> str | None:
        """Digest of what they trained from; None is not known."""
        return self.tags.get(TAG_INPUTS)


def what_is_recorded(client: MlflowClient, run_id: str) -> Recorded:
    """Ask MLflow what the run holds.

    :raises Exception: whatever MLflow's client raises.
    """
    data = client.get_run(run_id).data
    histories = {key: client.get_metric_history(run_id, key) for key in data.metrics}
    steps = {key: max(metric.step for metric in history) for key, history in histories.items()}
    points = {
        key: {metric.step: metric.value for metric in history if math.isfinite(metric.value)}
        for key, history in histories.items()
    }
    return Recorded(steps, data.tags, points)
