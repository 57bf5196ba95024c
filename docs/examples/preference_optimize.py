"""``PreferenceOptimizeOperator``: trains on chosen and rejected answers, here adapters by DPO.

The model may be another job's checkpoint, by the ``path`` that the job returns: ``models:/m-…``.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from post_training.operators.training import PreferenceOptimizeOperator

with DAG(
    "example_preference_optimize",
    doc_md=__doc__,
    schedule=None,
    params={
        "finetuned_model": Param("HuggingFaceTB/SmolLM2-135M-Instruct", type="string", minLength=1),
        "dataset_id": Param("pairs.jsonl", type="string", minLength=1),
    },
    tags=["example"],
):
    PreferenceOptimizeOperator(
        task_id="align",
        finetuned_model="{{ params.finetuned_model }}",
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
        algorithm_config={"beta": 0.1, "loss_type": "sigmoid"},
        runtime={
            "adapter": {
                "type": "LoRA",
                "lora_attn_modules": ["q_proj", "v_proj"],
                "apply_lora_to_mlp": False,
                "apply_lora_to_output": False,
                "rank": 8,
                "alpha": 16,
            },
        },
        retries=5,
        retry_delay=timedelta(seconds=30),
    )
