"""The DAG that keeps the record true."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.dag_processing.dagbag import DagBag

from post_training.operators.jobs import ReconcileTrainingJobsOperator

DAGS = Path(__file__).resolve().parents[2] / "dags"


def test_it_looks_every_five_minutes_and_never_twice_at_once() -> None:
    bag = DagBag(DAGS / "reconcile.py")
    assert bag.import_errors == {}
    dag = bag.dags["reconcile"]
    assert (dag.schedule, dag.catchup, dag.max_active_runs) == (timedelta(minutes=5), False, 1)
    assert dag.is_paused_upon_creation is False
    (task,) = dag.tasks
    assert isinstance(task, ReconcileTrainingJobsOperator)
