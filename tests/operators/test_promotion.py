"""The operators that decide, promote and roll back, against a real MLflow registry."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException, DownstreamTasksSkipped

from post_training.model_registry import ModelRegistry
from post_training.operators.promotion import (
    PROMOTIONS,
    ApprovePromotionOperator,
    GateOperator,
    PromoteOperator,
    RollbackOperator,
    champion_asset,
)
from post_training.schemas.evaluation import EvaluationValues, ExampleValues
from tests.operators.stages import StageWorkplace

GATES = {"gates": [{"metric": "loss", "confidence": 0.95, "min_improvement": 0.0}]}


def evaluated(stages: StageWorkplace, **losses: float) -> str:
    """Make an evaluation's run in which each model has one loss on all of twenty examples."""
    run = stages.client.create_run(stages.tracking.experiment("post-training").experiment_id)
    values = EvaluationValues(
        models={name: ExampleValues(nll=[loss * 4] * 20, tokens=[4] * 20) for name, loss in losses.items()}
    )
    stages.client.log_text(run.info.run_id, values.model_dump_json(), "values.json")
    return str(run.info.run_id)


def gate(stages: StageWorkplace, run_id: str, **fields: Any) -> GateOperator:
    given = {"evaluation_run_id": run_id, "config": GATES, **fields}
    return stages.over_mlflow(GateOperator(task_id="task", **given))


def promote(stages: StageWorkplace, name: str, compared_with: int | None = None, **fields: Any) -> Any:
    run = stages.client.create_run(stages.tracking.experiment("post-training").experiment_id)
    given = {
        "registered_model": name,
        "checkpoint": stages.checkpoint(),
        "candidacy_run_id": run.info.run_id,
        "compared_with": compared_with,
        "reason": "loss 1 instead of the champion's 2.",
        "lineage": {"post_training.base_model": "org/model"},
        **fields,
    }
    return stages.over_mlflow(PromoteOperator(task_id="task", **given))


def test_an_accepted_candidate_goes_on_with_the_reason(stages: StageWorkplace) -> None:
    run_id = evaluated(stages, candidate=1.0, champion=2.0)
    decision = gate(stages, run_id).execute(stages.context("night", behind=("promote",)))
    assert decision["accepted"] is True
    assert "instead of the champion's 2" in decision["reason"]
    tags = stages.client.get_run(run_id).data.tags
    assert tags["post_training.decision"] == "accepted"
    assert tags["post_training.reason"] == decision["reason"]
    table = json.loads(Path(stages.client.download_artifacts(run_id, "gates.json")).read_text())
    assert (table["columns"][0], table["data"][0][0]) == ("metric", "loss")
    assert stages.pushed["_link_MLflowRunLink"].endswith(f"/runs/{run_id}")


def test_what_is_behind_a_rejected_candidate_is_skipped(stages: StageWorkplace) -> None:
    run_id = evaluated(stages, candidate=2.0, champion=1.0)
    with pytest.raises(DownstreamTasksSkipped) as caught:
        gate(stages, run_id).execute(stages.context("night", behind=("approve", "promote")))
    assert caught.value.tasks == ["approve", "promote"]
    decision = stages.pushed["return_value"]
    assert decision["accepted"] is False
    assert decision["reason"].startswith("loss 2 is not better than the champion's 1")
    assert stages.client.get_run(run_id).data.tags["post_training.decision"] == "rejected"


def test_a_decision_may_be_another_runs(stages: StageWorkplace) -> None:
    other = evaluated(stages)
    run_id = evaluated(stages, candidate=1.0)
    gate(stages, run_id, decision_run_id=other).execute(stages.context("night"))
    assert stages.client.get_run(other).data.tags["post_training.decision"] == "accepted"
    assert "post_training.decision" not in stages.client.get_run(run_id).data.tags


def test_a_gate_on_what_was_not_measured_fails_for_good(stages: StageWorkplace) -> None:
    config = {"gates": [{"metric": "exact_match", "at_least": 0.5}]}
    with pytest.raises(AirflowFailException, match=r"config\.gates\.0\.metric: must be measured"):
        gate(stages, evaluated(stages, candidate=1.0), config=config).execute(stages.context("night"))


def test_an_evaluation_that_is_not_there_fails_for_good(stages: StageWorkplace) -> None:
    run_id = stages.client.create_run("0").info.run_id
    for unknown, sentence in (
        (run_id, r"the MLflow run '.*' has no values\.json"),
        ("0" * 32, "evaluation_run_id: MLflow has no such run"),
    ):
        with pytest.raises(AirflowFailException, match=sentence):
            gate(stages, unknown).execute(stages.context("night"))


def test_a_promotion_is_registered_with_its_lineage_and_announced(stages: StageWorkplace) -> None:
    operator, context = promote(stages, "announced"), stages.context("night")
    outcome = operator.execute(context)
    assert outcome == {"version": 1, "model_uri": "models:/announced/1", "replaces": None}
    version = stages.client.get_model_version_by_alias("announced", "champion")
    assert version.tags["post_training.base_model"] == "org/model"
    assert version.description == "loss 1 instead of the champion's 2."
    tags = stages.client.get_run(operator.candidacy_run_id).data.tags
    assert tags["post_training.decision"] == "promoted"
    ((uri, extra),) = context["outlet_events"][PROMOTIONS].added
    assert uri == champion_asset("announced").uri == "x-post-training://models/announced/champion"
    assert extra["model_uri"] == "models:/announced/1"
    assert extra["mlflow_run_id"] == operator.candidacy_run_id
    assert operator.execute(stages.context("night")) == outcome
    assert len(stages.client.search_model_versions("name='announced'")) == 1
    assert stages.pushed["_link_MLflowRunLink"].endswith(f"/runs/{operator.candidacy_run_id}")
    assert stages.pushed["_link_ModelVersionLink"].endswith("/#/models/announced/versions/1")


def test_a_candidate_that_was_compared_with_another_champion_is_skipped(stages: StageWorkplace) -> None:
    promote(stages, "overtaken").execute(stages.context("night"))
    operator, context = promote(stages, "overtaken"), stages.context("night")
    with pytest.raises(AirflowSkipException, match="was compared with no champion of overtaken"):
        operator.execute(context)
    tags = stages.client.get_run(operator.candidacy_run_id).data.tags
    assert tags["post_training.decision"] == "rejected"
    assert "the champion is version 1 by now" in tags["post_training.reason"]
    assert context["outlet_events"][PROMOTIONS].added == []
    assert stages.client.get_model_version_by_alias("overtaken", "champion").version == "1"


def test_a_promotion_that_others_have_followed_announces_nothing(stages: StageWorkplace) -> None:
    first = promote(stages, "followed")
    first.execute(stages.context("night"))
    promote(stages, "followed", 1).execute(stages.context("next night"))
    context = stages.context("night")
    with pytest.raises(AirflowSkipException, match="models:/followed/1 was promoted before"):
        first.execute(context)
    first.checkpoint = stages.checkpoint()
    with pytest.raises(AirflowSkipException, match="has registered models:/followed/1 of another checkpoint"):
        first.execute(context)
    assert context["outlet_events"][PROMOTIONS].added == []
    tags = stages.client.get_run(first.candidacy_run_id).data.tags
    assert tags["post_training.decision"] == "promoted"


def test_a_promotion_that_was_cut_off_is_finished_and_announced_by_the_next(stages: StageWorkplace) -> None:
    cut_off = promote(stages, "finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRegistry, "_crown", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cut_off.execute(stages.context("night"))
    late, context = promote(stages, "finished"), stages.context("next night")
    assert late.execute(context)["model_uri"] == "models:/finished/1"
    ((_, extra),) = context["outlet_events"][PROMOTIONS].added
    assert (extra["version"], extra["mlflow_run_id"]) == (1, cut_off.candidacy_run_id)
    decisions = [
        stages.client.get_run(one.candidacy_run_id).data.tags["post_training.decision"]
        for one in (cut_off, late)
    ]
    assert decisions == ["promoted", "rejected"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"compared_with": "two"}, "compared_with: must be a version's number, got 'two'"),
        ({"lineage": "{'base': 'x'}"}, "lineage: must be an object or a JSON string of one"),
        ({"lineage": "[1]"}, "lineage: must be an object, got list"),
        ({"registered_model": "it's"}, "model.name: may hold letters"),
        ({"candidacy_run_id": "0" * 32}, "candidacy_run_id: MLflow has no such run"),
    ],
)
def test_a_wrong_parameter_is_named_and_nothing_promoted(
    stages: StageWorkplace, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AirflowFailException, match=sentence):
        promote(stages, "wrong", **fields).execute(stages.context("night"))
    assert list(stages.client.search_registered_models("name='wrong'")) == []


def test_none_without_native_objects_is_none(stages: StageWorkplace) -> None:
    operator = promote(stages, "rendered", compared_with="None", lineage="None")
    assert operator.execute(stages.context("night"))["version"] == 1


def test_why_a_gate_failed_is_in_the_nights_run(stages: StageWorkplace) -> None:
    night = stages.client.create_run("0").info.run_id
    with pytest.raises(AirflowFailException):
        gate(stages, evaluated(stages), decision_run_id=night).execute(stages.context("night"))
    assert "no values of the candidate" in stages.client.get_run(night).data.tags["post_training.error"]


def test_an_answer_is_kept_also_if_it_is_a_no(stages: StageWorkplace) -> None:
    operator = ApprovePromotionOperator(task_id="approve", subject="Promote?")
    context = stages.context("night", behind=("promote",))
    operator.downstream_task_ids.add("promote")
    user = {"id": "1", "name": "Ada"}
    event = {
        "chosen_options": ["Reject"],
        "params_input": {},
        "responded_at": datetime.now(UTC),
        "responded_by_user": user,
    }
    with pytest.raises(DownstreamTasksSkipped):
        operator.execute_complete(context, event)
    assert stages.pushed["return_value"] == {"chosen_options": ["Reject"], "responded_by_user": user}


def test_a_rollback_brings_the_version_before_back(stages: StageWorkplace) -> None:
    promote(stages, "rolled").execute(stages.context("night"))
    promote(stages, "rolled", 1).execute(stages.context("night"))
    operator = stages.over_mlflow(RollbackOperator(task_id="task", registered_model="rolled"))
    context = stages.context("rollback")
    assert operator.execute(context) == {"version": 1, "model_uri": "models:/rolled/1", "replaces": 2}
    assert stages.client.get_model_version_by_alias("rolled", "champion").version == "1"
    ((uri, extra),) = context["outlet_events"][PROMOTIONS].added
    assert (uri, extra["version"]) == (champion_asset("rolled").uri, 1)
    assert stages.pushed["_link_ModelVersionLink"].endswith("/#/models/rolled/versions/1")
    assert operator.execute(stages.context("rollback"))["version"] == 1  # an attempt more at the same
    again = stages.over_mlflow(RollbackOperator(task_id="task", registered_model="rolled"))
    with pytest.raises(AirflowFailException, match="no version 'previous' to roll back to"):
        again.execute(stages.context("second rollback"))


def test_a_models_asset_has_a_uri_whatever_its_name() -> None:
    assert champion_asset("support bot").uri == "x-post-training://models/support%20bot/champion"
