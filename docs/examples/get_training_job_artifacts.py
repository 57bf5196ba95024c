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
        """Return the path of the checkpoint with the lowest validation loss; of the last, if none has one."""
        losses = {one["path"]: (one["training_metrics"] or {}).get("validation_loss") for one in checkpoints}
        measured = [(loss, path) for path, loss in losses.items() if loss is not None]
        return str(min(measured)[1] if measured else checkpoints[-1]["path"])

    best(checkpoints.output)
