"""Where the training operators are tested: real processes, in a folder of the test's own."""

from __future__ import annotations

import stat
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from airflow.sdk.exceptions import AirflowException

from post_training.job_ids import TaskKey
from post_training.operators.training import (
    PreferenceOptimizeOperator,
    SupervisedFineTuneOperator,
    TrainingOperator,
)
from post_training.schemas.trainer import TrainerSpec
from tests.fakes import FakeTracking
from tests.operators.conftest import connect
from tests.requests_of import dpo_body, sft_body

KEY = TaskKey("supervised_fine_tune", "job-1", "train")
PREFERENCE_KEY = TaskKey("preference_optimize", "job-1", "train")
RESULT = {"status": "completed", "metrics": {"train_loss": 1.5}}

Operator = TypeVar("Operator", bound=TrainingOperator)


def attempt_id(attempt: int) -> str:
    """The task instance's id: a UUID of version 7, greater with each attempt."""
    return f"018f0000-0000-7000-8000-{attempt:012}"


class Workplace:
    """Settings, a data set, and a trainer that does what ``program`` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "home"
        self.data = folder / "data" / "train.jsonl"
        self.data.parent.mkdir()
        self.data.write_text("{}\n")
        self.trainer = folder / "trainer"
        self.tracking = FakeTracking()
        self.links: dict[str, str] = {}
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__HOME", str(self.home))
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__ALLOWED_ROOTS", str(self.data.parent))
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__TRAINER_PYTHON", str(self.trainer))
        connect(monkeypatch, host="http://airflow/post-training", extra={"runtime": {"seed": 7}})
        self.trains(f"result = {RESULT!r}")

    def trains(self, program: str) -> None:
        """Let the trainer run ``program``; what it leaves in ``result`` is written."""
        self.trainer.write_text(
            f"#!{sys.executable} -u\n"
            "import json, os, sys, time\n"
            "from pathlib import Path\n"
            "spec = Path(sys.argv[3])\n"
            "result = None\n"
            f"{program}\n"
            "if result is not None:\n"
            "    result = {'attempt_id': json.loads(spec.read_text())['attempt_id'], **result}\n"
            "    (spec.parent / 'result.json').write_text(json.dumps(result))\n"
        )
        self.trainer.chmod(self.trainer.stat().st_mode | stat.S_IXUSR)

    def fails(self, program: str, **context: Any) -> None:
        """Let an attempt run ``program``, which fails it."""
        self.trains(program)
        with pytest.raises(AirflowException):
            self.operator().execute(self.context(**context))

    def operator(self, **fields: Any) -> SupervisedFineTuneOperator:
        body = sft_body()
        given = {name: body[name] for name in ("model", "training_config", "algorithm_config")}
        return self.over_fakes(SupervisedFineTuneOperator(task_id="train", **(given | fields)))

    def preference(self, **fields: Any) -> PreferenceOptimizeOperator:
        body = dpo_body()
        given = {name: body[name] for name in ("finetuned_model", "training_config", "algorithm_config")}
        return self.over_fakes(PreferenceOptimizeOperator(task_id="train", **(given | fields)))

    def over_fakes(self, operator: Operator) -> Operator:
        operator.tracking = self.tracking  # type: ignore[assignment]
        return operator

    def context(
        self,
        key: TaskKey = KEY,
        conf: dict[str, Any] | None = None,
        *,
        attempt: int = 1,
        max_tries: int = 0,
    ) -> Any:
        """What Airflow tells a task: by default of an attempt that is the last one allowed."""
        ti = SimpleNamespace(
            dag_id=key.dag_id,
            run_id=key.run_id,
            task_id=key.task_id,
            map_index=key.map_index,
            id=attempt_id(attempt),
            try_number=attempt,
            max_tries=max_tries,
            start_date=datetime.now(UTC),
            log_url="http://airflow/run",
            xcom_push=lambda key, value: self.links.update({key: value}),
        )
        return {"ti": ti, "dag_run": SimpleNamespace(conf=conf or {}, run_id=key.run_id)}

    @property
    def work_dir(self) -> Path:
        return self.work_dir_of(KEY)

    def work_dir_of(self, key: TaskKey) -> Path:
        return self.home / "jobs" / key.dag_id / key.run_id / key.task_id

    def spec_of(self, operator: TrainingOperator, key: TaskKey = KEY) -> TrainerSpec:
        """Let the operator run a trainer that fails at once, and return what this one was told."""
        self.trains("result = {'status': 'failed', 'error': 'stop here'}")
        with pytest.raises(AirflowException, match="stop here"):
            operator.execute(self.context(key))
        return TrainerSpec.model_validate_json((self.work_dir_of(key) / "spec.json").read_text())
