"""``EvaluateOperator``: measures models side by side on held-out data.

It returns the MLflow run that holds the table, the picture and the samples: what a gate asks for.
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from post_training.operators.evaluation import EvaluateOperator

with DAG(
    "example_evaluate",
    doc_md=__doc__,
    schedule=None,
    params={
        "base": Param("HuggingFaceTB/SmolLM2-135M-Instruct", type="string", minLength=1),
        "candidate": Param(type="string", minLength=1, description="Path of a checkpoint."),
        "dataset_id": Param("held-out.jsonl", type="string", minLength=1),
    },
    tags=["example"],
):
    EvaluateOperator(
        task_id="evaluate",
        models={"base": "{{ params.base }}", "candidate": "{{ params.candidate }}"},
        config={"dataset_id": "{{ params.dataset_id }}", "max_examples": 200, "samples": 5},
    )
