"""``PostTrainingJobSensor``: waits for a job that somebody else has started; fails if the job does.

With ``deferrable`` the triggerer waits, and no worker slot is taken.
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from post_training.operators.sensors import PostTrainingJobSensor

with DAG(
    "example_post_training_job_sensor",
    doc_md=__doc__,
    schedule=None,
    params={"job_uuid": Param(type="string", minLength=1, description="The job's id.")},
    tags=["example"],
):
    PostTrainingJobSensor(
        task_id="wait", job_uuid="{{ params.job_uuid }}", deferrable=True, poke_interval=10, timeout=86_400
    )
