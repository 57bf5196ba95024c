"""``search_before``: trials of a search run before a training task, which takes the best of them.

It puts two tasks in front, ``train_plan`` and the mapped ``train_trials``. What has to be done before the
training is put before the plan, which the function returns.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, Param

from post_training.operators.search import search_before
from post_training.operators.training import SupervisedFineTuneOperator

with DAG(
    "example_search_before",
    doc_md=__doc__,
    schedule=None,
    params={
        "model": Param("HuggingFaceTB/SmolLM2-135M-Instruct", type="string", minLength=1),
        "dataset_id": Param("train.jsonl", type="string", minLength=1),
        "n_trials": Param(8, type="integer", minimum=1),
    },
    tags=["example"],
):
    extract = EmptyOperator(task_id="extract")
    train = SupervisedFineTuneOperator(
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
            "apply_lora_to_mlp": False,
            "apply_lora_to_output": False,
            "rank": 8,
            "alpha": 16,
        },
        hyperparam_search_config={
            "space": {"algorithm_config.rank": {"type": "categorical", "choices": [4, 8, 16]}},
            "n_trials": "{{ params.n_trials }}",
            "max_parallel": 2,
        },
        retries=5,
        retry_delay=timedelta(seconds=30),
    )
    extract >> search_before(train)
