"""The real trainer, which waits at an optimizer step until a test lets it go on or kills it.

``python -m tests.lightning_modules.paused_trainer spec.json OPTIONS``, with options in JSON:

- ``pause_at``: the step after whose metrics it waits (null: nowhere),
- ``patience``: the seconds for which it waits for MLflow.

While it waits ``spec.paused`` is there, until ``spec.go`` is. At its end it says whether torch was imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

from lightning_modules import record, train
from post_training.schemas.trainer import TrainerSpec


class Paused:
    """A record at which its trainer waits once.

    :param inner: the record that is really written to.
    :param step: optimizer step at whose first metrics it waits.
    :param beside: the file beside which the marks lie.
    """

    def __init__(self, inner: record.JobRecord, step: int | None, beside: Path) -> None:
        self._inner = inner
        self._step = step
        self._beside = beside

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record, then wait."""
        self._inner.log_metrics(metrics, step)
        if step == self._step:
            self._step = None
            self._beside.with_suffix(".paused").touch()
            while not self._beside.with_suffix(".go").exists():
                sleep(0.02)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def main() -> int:
    """Train with the options; return the trainer's exit code."""
    spec_file, options = sys.argv[1], json.loads(sys.argv[2])
    open_record = record.open_record
    if "patience" in options:
        from lightning_modules import mlflow_record

        opened = partial(mlflow_record.open_mlflow_record, patience=options["patience"])
        mlflow_record.open_mlflow_record = opened  # type: ignore[assignment]
        open_record = partial(open_record, close_timeout=1.0)

    def paused(spec: TrainerSpec) -> Any:
        return Paused(open_record(spec), options.get("pause_at"), Path(spec_file))

    record.open_record = paused
    code = train.main([spec_file])
    print("torch was imported" if "torch" in sys.modules else "without torch")
    return code


if __name__ == "__main__":
    sys.exit(main())
