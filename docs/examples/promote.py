"""``PromoteOperator``: registers a checkpoint in MLflow's model registry and makes it the champion.

A DAG that is to run then is scheduled on ``champion_asset("assistant")``.
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from post_training.operators.promotion import PromoteOperator

with DAG(
    "example_promote",
    doc_md=__doc__,
    schedule=None,
    params={
        "registered_model": Param("assistant", type="string", minLength=1),
        "checkpoint": Param(type="string", minLength=1, description="Path of a checkpoint: models:/m-…"),
        "candidacy_run_id": Param(type="string", minLength=1, description="MLflow run that made it."),
        "compared_with": Param(0, type="integer", description="Version of the champion before; 0 is none."),
        "reason": Param("", type="string"),
    },
    tags=["example"],
):
    PromoteOperator(
        task_id="promote",
        registered_model="{{ params.registered_model }}",
        checkpoint="{{ params.checkpoint }}",
        candidacy_run_id="{{ params.candidacy_run_id }}",
        compared_with="{{ params.compared_with }}",
        reason="{{ params.reason }}",
    )
