"""``GetTrainingJobArtifactsOperator``: returns a job's checkpoints, oldest first; here the best is taken."""

from __future__ import annotations

from typing import Any

from airflow.sdk import DAG, Param, task

from post_training.operators.jobs import GetTrainingJobArtifactsOperator

with DAG(
    "example_get_training_job_artifacts",
    doc_md=__doc__,
    schedule=None,
    params={"job_uuid": Param(type="string", minLength=1, description="The job's id.")},
    tags=["example"],
):
    checkpoints = GetTrainingJobArtifactsOperator(task_id="checkpoints", job_uuid="{{ params.job_uuid }}")

    @task
    def best(checkpoints: Any) -> str:
        """Return the path of the checkpoint whose validation loss is the lowest."""
        found = min(checkpoints, key=lambda checkpoint: checkpoint["training_metrics"]["validation_loss"])
        return str(found["path"])

    best(checkpoints.output)
