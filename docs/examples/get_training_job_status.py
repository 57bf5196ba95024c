"""``GetTrainingJobStatusOperator``: returns a job's status, its times, resources and checkpoints."""

from __future__ import annotations

from airflow.sdk import DAG, Param

from post_training.operators.jobs import GetTrainingJobStatusOperator

with DAG(
    "example_get_training_job_status",
    doc_md=__doc__,
    schedule=None,
    params={"job_uuid": Param(type="string", minLength=1, description="The job's id.")},
    tags=["example"],
):
    GetTrainingJobStatusOperator(task_id="status", job_uuid="{{ params.job_uuid }}")
