"""The operator that compares models, around a stand-in for the process."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from post_training.operators.evaluation import EvaluateOperator
from tests.operators.stages import StageWorkplace

MEASURED = {"status": "completed", "metrics": {"base": {"loss": 2.0}}}
WRITES = "(folder / 'evaluation-result.json').write_text(json.dumps({result!r}))"
KEEPS = "Path({copy!r}).write_text(json.dumps(spec)); "


def operator(stages: StageWorkplace, **fields: Any) -> EvaluateOperator:
    given: dict[str, Any] = {
        "models": {"base": "org/model"},
        "config": {"dataset_id": stages.file("heldout.jsonl")},
        **fields,
    }
    return stages.over_mlflow(EvaluateOperator(task_id="task", **given))


def spec_of(stages: StageWorkplace, run_id: str, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate; return what the process was told, and what the task returned."""
    import json

    copy = stages.data.parent / "spec.json"
    stages.runs_program(KEEPS.format(copy=str(copy)) + WRITES.format(result=MEASURED))
    outcome = operator(stages, **fields).execute(stages.context(run_id))
    return json.loads(copy.read_text()), outcome


def test_models_are_measured_in_a_run_of_their_own(stages: StageWorkplace) -> None:
    parent = stages.client.create_run(stages.tracking.experiment("post-training").experiment_id)
    spec, outcome = spec_of(stages, "eval-1", parent_run_id=parent.info.run_id)
    run = stages.client.get_run(outcome["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["airflow.url"] == "http://airflow/run"
    assert spec["tracking"]["run_id"] == run.info.run_id
    assert (spec["models"], spec["data"]) == ({"base": "org/model"}, str(stages.data / "heldout.jsonl"))
    assert outcome == {
        "mlflow_run_id": run.info.run_id,
        "models": {"base": "org/model"},
        "champion": None,
        "metrics": {"base": {"loss": 2.0}},
    }
    assert run.info.run_id in stages.pushed["_link_MLflowRunLink"]
    assert not (stages.home / "jobs" / "scheduled_retraining" / "eval-1" / "task").exists()


def test_an_alias_is_measured_as_the_version_that_it_is(stages: StageWorkplace) -> None:
    stages.register("pinned", {"champion": 2}, versions=2)
    spec, outcome = spec_of(
        stages, "eval-2", models={"served": "models:/pinned@champion"}, champion_of="pinned"
    )
    assert spec["models"] == {"served": "models:/pinned/2", "champion": "models:/pinned/2"}
    assert outcome["champion"] == 2


def test_while_there_is_no_champion_none_is_measured(stages: StageWorkplace) -> None:
    spec, outcome = spec_of(stages, "eval-3", champion_of="never-promoted")
    assert (list(spec["models"]), outcome["champion"]) == (["base"], None)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"models": {"base": "/etc"}}, r"models\.base: must lie under a folder"),
        ({"models": {}}, r"models: Dictionary should have at least 1 item"),
        ({"config": {"dataset_id": "gone.jsonl"}}, r"config\.dataset_id: no such file"),
        ({"config": {"dataset_id": "x.jsonl", "beta": 0}}, r"config\.beta: .*greater than 0"),
        ({"models": {"served": "models:/nobody@champion"}}, "no version of the registered model 'nobody'"),
        ({"models": "{'base': 'x'}"}, "models: must be an object or a JSON string of one"),
        ({"config": "[1]"}, "config: must be an object, got list"),
        (
            {"models": {"champion": "org/model"}, "champion_of": "x"},
            r"models\.champion: must be left out: champion_of 'x'",
        ),
    ],
)
def test_what_cannot_be_had_fails_for_good(
    stages: StageWorkplace, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AirflowFailException, match=sentence):
        operator(stages, **fields).execute(stages.context(f"refused-{sentence[:12]}"))


@pytest.mark.parametrize(("permanent", "error"), [(True, AirflowFailException), (False, AirflowException)])
def test_a_failure_is_told_and_repeated_only_if_it_helps(
    stages: StageWorkplace, permanent: bool, error: type[Exception]
) -> None:
    result = {"status": "failed", "error": "No row can be used.", "permanent": permanent}
    stages.runs_program(WRITES.format(result=result))
    with pytest.raises(error, match="No row can be used") as caught:
        operator(stages).execute(stages.context(f"fails-{permanent}"))
    assert isinstance(caught.value, AirflowFailException) is permanent
    (run,) = stages.client.search_runs(
        [stages.tracking.experiment("post-training").experiment_id],
        f"tags.`airflow.run_id` = 'fails-{permanent}'",
    )
    assert (run.info.status, run.data.tags["post_training.error"]) == ("FAILED", "No row can be used.")


def test_a_second_attempt_goes_on_in_the_same_run(stages: StageWorkplace) -> None:
    stages.runs_program("os.kill(os.getpid(), 9)")
    with pytest.raises(AirflowException, match="killed by signal 9"):
        operator(stages).execute(stages.context("again"))
    _, outcome = spec_of(stages, "again")
    found = stages.client.search_runs(
        [stages.tracking.experiment("post-training").experiment_id], "tags.`airflow.run_id` = 'again'"
    )
    assert [run.info.run_id for run in found] == [outcome["mlflow_run_id"]]
    assert found[0].info.status == "FINISHED"
