"""Takes the last promotion of a registered model back: the version before is the champion again."""

from __future__ import annotations

from airflow.sdk import DAG, Param

from post_training.operators.promotion import RollbackOperator

with DAG(
    "rollback_model",
    description="Make the previous version of a registered model its champion again.",
    doc_md=__doc__,
    schedule=None,
    params={
        "registered_model": Param(
            type="string",
            minLength=1,
            section="Model",
            description="Name in MLflow's model registry; it must have a version before its champion.",
        ),
        "reason": Param(
            "",
            type="string",
            section="Model",
            description="One sentence, for whoever is scheduled on the model; it may be empty.",
        ),
    },
    max_active_runs=1,
    is_paused_upon_creation=False,
    tags=["post-training"],
):
    RollbackOperator(
        task_id="rollback", registered_model="{{ params.registered_model }}", reason="{{ params.reason }}"
    )
