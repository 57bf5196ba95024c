"""``RollbackOperator``: makes the previous version of a registered model its champion again.

The DAG ``rollback_model`` does the same.
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from post_training.operators.promotion import RollbackOperator

with DAG(
    "example_rollback",
    doc_md=__doc__,
    schedule=None,
    params={"registered_model": Param("assistant", type="string", minLength=1)},
    tags=["example"],
):
    RollbackOperator(
        task_id="rollback",
        registered_model="{{ params.registered_model }}",
        reason="Asked for by {{ dag_run.triggering_user_name }}.",
    )
