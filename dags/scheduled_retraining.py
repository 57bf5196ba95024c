"""Every night: new data in, a better model out, or nothing changed and a reason why.

The data is split, a model is trained in up to three stages, and compared with the champion and the base model
on questions that no training has seen. What passes the gates becomes the champion in MLflow's registry. All
runs of a night are below one MLflow run, which says how it ended and why.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, TriggerRule, chain

from post_training.operators.evaluation import EvaluateOperator
from post_training.operators.promotion import ApprovePromotionOperator, GateOperator, PromoteOperator
from post_training.operators.retraining import (
    MACROS,
    ConcludeRetrainingOperator,
    PrepareRetrainingOperator,
)
from post_training.operators.retraining_params import load_retraining, retraining_params, retraining_schedule
from post_training.operators.search import search_before
from post_training.operators.training import PreferenceOptimizeOperator, SupervisedFineTuneOperator

retraining = load_retraining(Path(__file__).with_suffix(".yaml"))
night = "ti.xcom_pull(task_ids='prepare')"
parent = f"{{{{ {night}['mlflow_run_id'] }}}}"
resumed: dict[str, Any] = {"retries": 5, "retry_delay": timedelta(seconds=30), "parent_run_id": parent}
after_optional: dict[str, Any] = {"trigger_rule": TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS}

with DAG(
    "scheduled_retraining",
    description="Retrain a model, and promote it if it is better.",
    doc_md=__doc__,
    schedule=retraining_schedule(retraining),
    params=retraining_params(retraining),
    user_defined_macros=MACROS,
    render_template_as_native_obj=True,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=30)},
    max_active_runs=1,
    catchup=False,
    tags=["post-training"],
):
    prepare = PrepareRetrainingOperator(task_id="prepare", config="{{ params }}")
    supervised_fine_tune = SupervisedFineTuneOperator(
        task_id="supervised_fine_tune", request="{{ stage_request(ti, 'supervised_fine_tune') }}", **resumed
    )
    preference_optimize = PreferenceOptimizeOperator(
        task_id="preference_optimize",
        request="{{ stage_request(ti, 'preference_optimize') }}",
        **resumed,
        **after_optional,
    )
    quantize = SupervisedFineTuneOperator(
        task_id="quantize", request="{{ stage_request(ti, 'quantize') }}", **resumed, **after_optional
    )
    evaluate = EvaluateOperator(
        task_id="evaluate",
        models={"base": f"{{{{ {night}['base'] }}}}", "candidate": "{{ candidate(ti) }}"},
        champion_of=f"{{{{ {night}['registered_model'] }}}}",
        config=f"{{{{ {night}['evaluation'] }}}}",
        parent_run_id=parent,
        **after_optional,
    )
    gate = GateOperator(
        task_id="gate",
        evaluation_run_id="{{ ti.xcom_pull(task_ids='evaluate')['mlflow_run_id'] }}",
        config=f"{{{{ {night}['gate'] }}}}",
        decision_run_id=parent,
    )
    approve = ApprovePromotionOperator(
        task_id="approve",
        subject=f"Promote {{{{ {night}['registered_model'] }}}}?",
        body="{{ ti.xcom_pull(task_ids='gate')['reason'] }}",
        defaults="Reject",
        response_timeout=retraining.approval.timeout,
    )
    promote = PromoteOperator(
        task_id="promote",
        registered_model=f"{{{{ {night}['registered_model'] }}}}",
        checkpoint="{{ candidate(ti) }}",
        candidacy_run_id=parent,
        compared_with="{{ ti.xcom_pull(task_ids='evaluate')['champion'] }}",
        reason="{{ ti.xcom_pull(task_ids='gate')['reason'] }}",
        lineage=f"{{{{ {night}['lineage'] }}}}",
        **after_optional,
    )
    conclude = ConcludeRetrainingOperator(task_id="conclude").as_teardown()

    stages = [supervised_fine_tune, preference_optimize, quantize]
    # A stage that is left out is skipped at once: each task waits for every stage before it.
    for number, stage in enumerate(stages):
        searched = retraining.searches(stage.task_id)
        [prepare, *stages[:number]] >> (search_before(stage, required=False) if searched else stage)
    [prepare, *stages] >> evaluate
    chain(evaluate, gate, approve, promote, conclude)
    prepare >> approve
    gate >> promote
