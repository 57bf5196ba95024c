"""``CancelTrainingJobOperator``: stops a job; its checkpoints so far are kept.

The task fails if there is no such job, or if it has ended.
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from post_training.operators.jobs import CancelTrainingJobOperator

with DAG(
    "example_cancel_training_job",
    doc_md=__doc__,
    schedule=None,
    params={"job_uuid": Param(type="string", minLength=1, description="The job's id.")},
    tags=["example"],
):
    CancelTrainingJobOperator(task_id="cancel", job_uuid="{{ params.job_uuid }}")
