"""``SupervisedFineTuneOperator``: its task is the job ``example_supervised_fine_tune.{run id}.train``.

It returns the job's id, its MLflow run, its checkpoints and its last metrics.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from post_training.operators.training import SupervisedFineTuneOperator

with DAG(
    "example_supervised_fine_tune",
    doc_md=__doc__,
    schedule=None,
    params={
        "model": Param("HuggingFaceTB/SmolLM2-135M-Instruct", type="string", minLength=1),
        "dataset_id": Param("train.jsonl", type="string", minLength=1),
    },
    tags=["example"],
):
    SupervisedFineTuneOperator(
        task_id="train",
        model="{{ params.model }}",
        training_config={
            "n_epochs": 1,
            "max_steps_per_epoch": 0,
            "data_config": {
                "dataset_id": "{{ params.dataset_id }}",
                "batch_size": 4,
                "shuffle": True,
                "data_format": "instruct",
            },
        },
        algorithm_config={
            "type": "LoRA",
            "lora_attn_modules": ["q_proj", "v_proj"],
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": False,
            "rank": 8,
            "alpha": 16,
        },
        retries=5,
        retry_delay=timedelta(seconds=30),
    )
