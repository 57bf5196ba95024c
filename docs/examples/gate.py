"""``GateOperator``: holds a candidate against the base model; what is behind it is skipped if it fails.

The decision and its reason are tags of the evaluation's MLflow run.
"""

from __future__ import annotations

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param

from post_training.operators.promotion import GateOperator

with DAG(
    "example_gate",
    doc_md=__doc__,
    schedule=None,
    params={
        "evaluation_run_id": Param(type="string", minLength=1, description="MLflow run of an evaluation."),
    },
    tags=["example"],
):
    gate = GateOperator(
        task_id="gate",
        evaluation_run_id="{{ params.evaluation_run_id }}",
        config={"gates": [{"metric": "loss", "against": "base", "min_improvement": 0.0}]},
    )
    gate >> EmptyOperator(task_id="accepted")
