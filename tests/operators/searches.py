"""Where the operators of a search are tested: a real MLflow, a real study, and a stand-in for the trainer."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from mlflow.entities import Run

from post_training.operators.search import PlanSearchOperator, SearchTrialsOperator
from post_training.operators.search_task import search_of
from post_training.operators.training import SupervisedFineTuneOperator
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.search import Search
from tests.mlflow_server import MLflowServer
from tests.operators.conftest import connect
from tests.operators.stages import StageWorkplace
from tests.operators.workplace import attempt_id
from tests.requests_of import changed, sft_body

DAG_ID = "supervised_fine_tune_search"
RANK = "algorithm_config.rank"

TRAINS = """
rank = spec['request']['algorithm_config']['rank']
epochs = spec['request']['training_config']['n_epochs']
def write(*events):
    with (folder / 'metrics.jsonl').open('a') as out:
        out.writelines(json.dumps(event) + '\\n' for event in events)
def measure(epoch, value):
    write({'kind': 'metrics', 'step': 2 * epoch, 'values': {'validation_loss': value}})
def finish(**result):
    done = {'attempt_id': spec['attempt_id'], 'status': 'completed', **result}
    (folder / 'result.json').write_text(json.dumps(done))
write({'kind': 'param', 'key': 'steps', 'value': str(2 * epochs)})
measure(0, 100.0)
"""
"""Of the stand-in, before what a test lets it do: its rank, and words for what it records."""

LEARNS = """
for epoch in range(1, epochs + 1):
    measure(epoch, rank / epoch)
finish(metrics={'validation_loss': rank / epochs})
"""
"""The larger the rank the worse."""


class SearchWorkplace(StageWorkplace):
    """The tasks of one search after the other, each a DAG run of its own."""

    def __init__(self, folder: Path, server: MLflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, server, monkeypatch)
        connect(monkeypatch, host="http://airflow/post-training")
        self.train_file = self.file("train.jsonl")
        self.states: dict[str, str] = {}
        self.trains(LEARNS)

    def trains(self, program: str) -> None:
        """Let each trainer do what ``program`` says."""
        self.runs_program(TRAINS + program)

    def body(self, job_uuid: str, search: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """A request whose search varies the rank."""
        config = {
            "space": {RANK: {"type": "categorical", "choices": [8, 2, 4]}},
            "sampler": "grid",
            "n_trials": 3,
            **(search or {}),
        }
        body = sft_body(
            job_uuid=job_uuid,
            training_config__data_config__dataset_id=self.train_file,
            hyperparam_search_config=config,
        )
        return changed(body, **changes)

    def study(self, body: dict[str, Any]) -> Search:
        """The study of a request that was planned."""
        return search_of(SupervisedFineTuneRequest.model_validate(body)).open()

    def plan(
        self, body: dict[str, Any], *, required: bool = True, parent: str | None = None, **context: Any
    ) -> Any:
        operator = PlanSearchOperator(
            task_id="plan",
            method="supervised_fine_tune",
            request=body,
            required=required,
            parent_run_id=parent,
        )
        return self.over_mlflow(operator).execute(self.at("plan", body, **context))

    def trials(self, body: dict[str, Any], worker: int = 0) -> SearchTrialsOperator:
        operator = SearchTrialsOperator(
            task_id="trials", method="supervised_fine_tune", request=body, worker=worker
        )
        return self.over_mlflow(operator)

    def run_trials(self, body: dict[str, Any], worker: int = 0, attempt: int = 1) -> Any:
        operator = self.trials(body, worker)
        return operator.execute(self.at("trials", body, map_index=worker, attempt=attempt))

    def train(self, body: dict[str, Any], attempt: int = 1, dag_id: str = DAG_ID) -> Any:
        with DAG(dag_id, schedule=None):
            operator = self.over_mlflow(SupervisedFineTuneOperator(task_id="train", request=body))
        return operator.execute(self.at("train", body, attempt=attempt, dag_id=dag_id))

    def at(
        self,
        task_id: str,
        body: dict[str, Any],
        *,
        map_index: int = -1,
        attempt: int = 1,
        dag_id: str = DAG_ID,
        conf: dict[str, Any] | None = None,
    ) -> Any:
        """What Airflow tells a task: of an attempt that is the last one allowed."""
        ti = SimpleNamespace(
            dag_id=dag_id,
            run_id=body["job_uuid"],
            task_id=task_id,
            map_index=map_index,
            id=attempt_id(attempt),
            try_number=attempt,
            max_tries=attempt - 1,
            log_url="http://airflow/run",
            xcom_push=lambda key, value: self.pushed.update({key: value}),
            get_task_states=lambda dag_id, task_ids, run_ids: {run_ids[0]: self.states},
        )
        return {"ti": ti, "dag_run": SimpleNamespace(conf=conf or {}, run_id=ti.run_id)}

    def job_run(self, body: dict[str, Any]) -> Run:
        """The job's run in MLflow."""
        found = self.tracking.find(body["job_uuid"])
        assert found is not None
        return self.client.get_run(found.run_id)

    def trial_runs(self, body: dict[str, Any]) -> list[Run]:
        """The runs below it, by the trial's number."""
        below = self.tracking.tagged("mlflow.parentRunId", self.job_run(body).info.run_id)
        runs = [self.client.get_run(run.run_id) for run in below]
        return sorted(runs, key=lambda run: int(run.data.tags["post_training.trial"]))

    def upload(self, run: Run, epoch: int, loss: float) -> str:
        """Make a checkpoint of a trial; return its path."""
        metrics = {"epoch": epoch, "train_loss": 1.0, "validation_loss": loss, "perplexity": 2.0}
        model = self.client.create_logged_model(
            run.info.experiment_id,
            name=f"epoch-{epoch}",
            source_run_id=run.info.run_id,
            tags={"post_training.checkpoint": json.dumps(metrics)},
        )
        self.client.finalize_logged_model(model.model_id, "READY")
        return f"models:/{model.model_id}"

    def stops(self, operator: SearchTrialsOperator, sign: Path) -> threading.Thread:
        """Kill a task, as Airflow does, once its trainer has made a file."""
        from tests.waiting import wait_until

        def kill() -> None:
            wait_until(sign.exists)
            operator.on_kill()

        thread = threading.Thread(target=kill)
        thread.start()
        return thread
