"""What a job's MLflow run holds already when an attempt begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from mlflow import MlflowClient

from post_training.schemas.record import TAG_INPUTS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recorded:
    """What a run holds of the attempts before.

    :param steps: last step of each metric.
    :param inputs: digest of what they trained from; None is not known.
    """

    steps: Mapping[str, int] = field(default_factory=dict)
    inputs: str | None = None


def ask_what_is_recorded(client: MlflowClient, run_id: str) -> Recorded:
    """Ask MLflow what the run holds: the attempt before may have run on another machine.

    Nothing, with a warning, if it does not answer.
    """
    try:
        data = client.get_run(run_id).data
        steps = {key: max(m.step for m in client.get_metric_history(run_id, key)) for key in data.metrics}
        return Recorded(steps, data.tags.get(TAG_INPUTS))
    except Exception as error:
        _log.warning("MLflow did not say what an earlier attempt recorded; points may repeat: %s", error)
        return Recorded()
