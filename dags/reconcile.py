"""Keeps MLflow's record true: a job that died, or was stopped in Airflow, has ended there as well.

Every read of a job does the same for that job; this DAG does it for jobs that nobody asks for. It also ends
the runs of nights, evaluations and trials that nobody else will.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from post_training.operators.jobs import ReconcileTrainingJobsOperator

with DAG(
    "reconcile",
    description="Bring the status of training jobs in MLflow to what Airflow knows.",
    doc_md=__doc__,
    schedule=timedelta(minutes=5),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=False,
    tags=["post-training"],
):
    ReconcileTrainingJobsOperator(task_id="reconcile", execution_timeout=timedelta(minutes=4))
