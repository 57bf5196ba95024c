"""Where the operators whose task is no job are tested: a real MLflow, and a stand-in for the process."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from airflow.sdk import BaseOperator
from mlflow import MlflowClient

from post_training.tracking import Tracking, TrackingServer
from tests.mlflow_server import MLflowServer
from tests.operators.workplace import attempt_id

Operator = TypeVar("Operator", bound=BaseOperator)


class StageWorkplace:
    """Settings, data, and a process that does what ``program`` says with its ``spec``."""

    def __init__(self, folder: Path, server: MLflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.data, self.process = folder / "home", folder / "data", folder / "process"
        self.data.mkdir()
        self.tracking = Tracking(TrackingServer(server.uri))
        self.client = MlflowClient(server.uri)
        self.pushed: dict[str, Any] = {}
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__HOME", str(self.home))
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__ALLOWED_ROOTS", str(self.data))
        monkeypatch.setenv("AIRFLOW__POST_TRAINING__TRAINER_PYTHON", str(self.process))

    def file(self, name: str) -> str:
        """Make a data set; return its path."""
        path = self.data / name
        path.write_text("{}\n")
        return str(path)

    def runs_program(self, program: str) -> None:
        """Let the process run ``program``, which knows ``spec`` and its ``folder``."""
        self.process.write_text(
            f"#!{sys.executable} -u\n"
            "import json, os, sys\n"
            "from pathlib import Path\n"
            "folder = Path(sys.argv[3]).parent\n"
            "spec = json.loads(Path(sys.argv[3]).read_text())\n"
            f"{program}\n"
        )
        self.process.chmod(self.process.stat().st_mode | stat.S_IXUSR)

    def over_mlflow(self, operator: Operator) -> Operator:
        """Let an operator write to the server of the test."""
        operator.tracking = self.tracking  # type: ignore[attr-defined]
        return operator

    def context(self, run_id: str, behind: tuple[str, ...] = (), pulled: dict[str, Any] | None = None) -> Any:
        """What Airflow tells a task.

        :param behind: tasks directly downstream.
        :param pulled: task -> what it returned.
        """
        from airflow.providers.standard.operators.empty import EmptyOperator

        ti = SimpleNamespace(
            dag_id="scheduled_retraining",
            run_id=run_id,
            task_id="task",
            map_index=-1,
            id=attempt_id(1),
            try_number=1,
            max_tries=0,
            log_url="http://airflow/run",
            xcom_push=lambda key, value: self.pushed.update({key: value}),
            xcom_pull=lambda task_ids: (pulled or {}).get(task_ids),
        )
        relatives = [EmptyOperator(task_id=name) for name in behind]
        task = SimpleNamespace(get_direct_relatives=lambda upstream=False: relatives)
        return {"ti": ti, "task": task, "outlet_events": _Events()}

    def register(self, name: str, aliases: dict[str, int], versions: int = 1, **tags: str) -> None:
        """Register versions of a model, with aliases."""
        self.client.create_registered_model(name)
        for number in range(1, versions + 1):
            source = self.checkpoint()
            self.client.create_model_version(
                name, source, tags=tags, model_id=source.removeprefix("models:/")
            )
            for alias, version in aliases.items():
                if version == number:
                    self.client.set_registered_model_alias(name, alias, str(version))

    def checkpoint(self) -> str:
        """Make a logged model; return its URI."""
        experiment = self.tracking.experiment("post-training").experiment_id
        model = self.client.create_logged_model(experiment)
        self.client.finalize_logged_model(model.model_id, "READY")
        return f"models:/{model.model_id}"


class _Events(dict[Any, Any]):
    """Outlet events: what was added to each."""

    def __missing__(self, key: Any) -> Any:
        added: list[tuple[str, dict[str, Any]]] = []
        self[key] = SimpleNamespace(add=lambda asset, extra: added.append((asset.uri, extra)), added=added)
        return self[key]
