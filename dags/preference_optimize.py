"""Preference optimization: the DAG behind ``POST …/preference-optimize`` and behind the trigger form.

One run is one job; the run's id is the job's id.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from post_training.operators.params import request_params
from post_training.operators.training import PreferenceOptimizeOperator
from post_training.schemas.record import REQUEST_TASK_ID
from post_training.schemas.requests import PreferenceOptimizeRequest

with DAG(
    "preference_optimize",
    description="Fine-tune a language model on chosen and rejected answers.",
    doc_md=__doc__,
    schedule=None,
    params=request_params(PreferenceOptimizeRequest),
    render_template_as_native_obj=True,
    is_paused_upon_creation=False,
    tags=["post-training"],
):
    PreferenceOptimizeOperator(
        task_id=REQUEST_TASK_ID,
        request="{{ params }}",
        retries=5,  # each goes on where the one before was cut; what cannot succeed is not tried again
        retry_delay=timedelta(seconds=30),
    )
