"""Supervised fine-tuning of the best of several trials: the DAG behind requests that hold a search.

One run is one job; the run's id is the job's id. Trials run side by side before the job's own task, which
takes the best of them.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG

from post_training.operators.params import request_params
from post_training.operators.search import search_before
from post_training.operators.training import SupervisedFineTuneOperator
from post_training.schemas.record import REQUEST_TASK_ID
from post_training.schemas.requests import SupervisedFineTuneRequest

with DAG(
    "supervised_fine_tune_search",
    description="Search hyperparameters while a language model is fine-tuned on given answers.",
    doc_md=__doc__,
    schedule=None,
    params=request_params(SupervisedFineTuneRequest, search=True),
    render_template_as_native_obj=True,
    is_paused_upon_creation=False,
    tags=["post-training"],
):
    train = SupervisedFineTuneOperator(
        task_id=REQUEST_TASK_ID,
        request="{{ params }}",
        retries=5,  # each goes on where the one before was cut; what cannot succeed is not tried again
        retry_delay=timedelta(seconds=30),
    )
    search_before(train)
