"""``GetTrainingJobsOperator``: returns the ids of all jobs that the connection's user sees, newest first."""

from __future__ import annotations

from airflow.sdk import DAG

from post_training.operators.jobs import GetTrainingJobsOperator

with DAG(
    "example_get_training_jobs",
    doc_md=__doc__,
    schedule=None,
    tags=["example"],
):
    GetTrainingJobsOperator(task_id="jobs")
