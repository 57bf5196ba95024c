"""``ReconcileTrainingJobsOperator``: what the DAG ``reconcile`` does every five minutes, where you want it.

It returns how many runs were checked, mended, stopped and discarded.
"""

from __future__ import annotations

from airflow.sdk import DAG

from post_training.operators.jobs import ReconcileTrainingJobsOperator

with DAG(
    "example_reconcile_training_jobs",
    doc_md=__doc__,
    schedule=None,
    tags=["example"],
):
    ReconcileTrainingJobsOperator(task_id="reconcile")
