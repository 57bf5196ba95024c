"""The operators around a retraining's stages: a real MLflow, and a stand-in for the process."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    DownstreamTasksSkipped,
)
from mlflow.entities import Run

from post_training.errors import RecordUnavailableError
from post_training.operators.promotion import PromoteOperator
from post_training.operators.retraining import (
    ConcludeRetrainingOperator,
    PrepareRetrainingOperator,
    candidate,
    stage_request,
)
from post_training.schemas.retraining import STAGES
from post_training.stage_runs import StageRuns
from tests.operators.stages import StageWorkplace
from tests.requests_of import LORA
from tests.schemas.test_retraining import TRAINING, config

SOURCES = ("rows", "pairs")
TRAINED = f"runs:/{'a1' * 16}/data/trained.digests"
ALL = (*STAGES, "evaluate", "approve")


def prepared(new_rows: int = 3, **files: str | None) -> dict[str, Any]:
    """What the process leaves: rows and pairs in all parts, but for those that are named."""
    parts = ("train", "validation", "evaluation")
    return {
        "status": "completed",
        "sources": {
            name: {
                "rows": dict.fromkeys(parts, 5),
                "files": {part: f"{name}.{part}.jsonl" for part in parts} | files,
                "new_rows": new_rows if name == "rows" else 0,
                "skipped": 0,
                "digest": f"digest of the {name}",
            }
            for name in SOURCES
        },
    }


class Night:
    """One night whose data the stand-in has prepared."""

    def __init__(self, stages: StageWorkplace) -> None:
        self.stages = stages
        self.copy = stages.data.parent / "spec.json"
        for name in ("rows.jsonl", "pairs.jsonl"):
            stages.file(name)

    def leaves(self, result: dict[str, Any]) -> None:
        self.stages.runs_program(
            f"Path({str(self.copy)!r}).write_text(json.dumps(spec))\n"
            f"(folder / 'preparation-result.json').write_text(json.dumps({result!r}))"
        )

    def prepare(
        self,
        run_id: str,
        result: dict[str, Any] | None = None,
        behind: tuple[str, ...] = ALL,
        **sections: Any,
    ) -> dict[str, Any]:
        """Run the task; return what it hands on."""
        sections = {"model": {"name": run_id, "base": "org/model"}, **sections}
        self.leaves(result or prepared())
        operator = PrepareRetrainingOperator(task_id="prepare", config=config(**sections))
        context = self.stages.context(run_id, behind=behind)
        context["ti"].task_id = "prepare"
        try:
            outcome = self.stages.over_mlflow(operator).execute(context)
        except DownstreamTasksSkipped as skipped:
            self.skipped = skipped.tasks
            outcome = self.stages.pushed["return_value"]
        return dict(outcome)

    @property
    def spec(self) -> dict[str, Any]:
        return dict(json.loads(self.copy.read_text()))

    def tags(self, run_id: str) -> dict[str, str]:
        """The tags of the night's MLflow run."""
        run = self.run(run_id)
        return dict(run.data.tags) | {"status": run.info.status}

    def metrics(self, run_id: str) -> dict[str, float]:
        """The metrics of the night's MLflow run."""
        return dict(self.run(run_id).data.metrics)

    def run(self, run_id: str) -> Run:
        """The night's MLflow run."""
        (run,) = self.stages.client.search_runs(
            [self.stages.tracking.experiment("post-training").experiment_id],
            f"tags.`airflow.run_id` = '{run_id}'",
        )
        return run


@pytest.fixture
def night(stages: StageWorkplace) -> Night:
    return Night(stages)


def test_each_stage_is_told_what_to_do(night: Night) -> None:
    outcome = night.prepare("told", approval={"required": True})
    run_id = outcome["mlflow_run_id"]
    assert night.tags("told")["status"] == "RUNNING"
    assert (outcome["registered_model"], outcome["base"], outcome["start"]) == (
        "told",
        "org/model",
        "org/model",
    )
    data = {
        stage: outcome["requests"][stage]["training_config"]["data_config"]["dataset_id"] for stage in STAGES
    }
    assert data == {
        "supervised_fine_tune": f"runs:/{run_id}/data/rows.train.jsonl",
        "preference_optimize": f"runs:/{run_id}/data/pairs.train.jsonl",
        "quantize": f"runs:/{run_id}/data/rows.train.jsonl",
    }
    assert outcome["evaluation"]["dataset_id"] == f"runs:/{run_id}/data/rows.evaluation.jsonl"
    assert outcome["evaluation"]["preference_dataset_id"] == f"runs:/{run_id}/data/pairs.evaluation.jsonl"
    assert outcome["lineage"]["post_training.digest.rows"] == "digest of the rows"
    assert outcome["lineage"]["post_training.trained"] == f"runs:/{run_id}/data/trained.digests"
    sources = {name: source["source"] for name, source in night.spec["sources"].items()}
    assert sources == {name: str(night.stages.data / f"{name}.jsonl") for name in ("rows", "pairs")}
    assert (night.spec["trained"], night.spec["starts_from_trained"]) == (None, False)


def test_stages_and_an_approval_that_are_not_wanted_are_skipped(night: Night) -> None:
    outcome = night.prepare("fewer", preference_optimize=None)
    assert night.skipped == ["preference_optimize", "approve"]
    assert list(outcome["requests"]) == ["supervised_fine_tune", "quantize"]


SEARCH = {"space": {"algorithm_config.rank": {"type": "int", "low": 2, "high": 8}}, "n_trials": 2}


def test_a_stage_that_the_dag_can_search_may_search(night: Night) -> None:
    searching = {
        "supervised_fine_tune": {
            "training_config": TRAINING,
            "algorithm_config": LORA,
            "hyperparam_search_config": SEARCH,
        }
    }
    behind = (*(f"{stage}_plan" for stage in STAGES), "evaluate", "approve")
    outcome = night.prepare("searches", behind=behind, preference_optimize=None, **searching)
    assert night.skipped == ["preference_optimize_plan", "approve"]
    assert outcome["requests"]["supervised_fine_tune"]["hyperparam_search_config"] == SEARCH
    with pytest.raises(AirflowFailException) as caught:
        night.prepare("cannot-search", **searching)
    assert str(caught.value).startswith(
        "supervised_fine_tune.hyperparam_search_config: needs a search in the file of the DAG, too"
    )


def test_what_is_only_compared_on_is_held_out_and_not_trained(night: Night) -> None:
    night.stages.file("own.jsonl")
    data = {"dataset_id": "rows.jsonl", "preference_dataset_id": "pairs.jsonl", "evaluation_fraction": 0.0}
    outcome = night.prepare(
        "own", data=data, evaluation={"dataset_id": "own.jsonl"}, preference_optimize=None
    )
    assert outcome["evaluation"]["dataset_id"] == "own.jsonl"
    assert night.spec["held_out"]["rows"]["source"] == str(night.stages.data / "own.jsonl")
    trained = {name: source["trained"] for name, source in night.spec["sources"].items()}
    assert trained == {"rows": True, "pairs": False}


def test_a_night_that_has_promoted_is_left_as_it_is(night: Night) -> None:
    """Whoever clears it from its first task on must not change what the champion was made from."""
    stages = night.stages
    run_id = night.prepare("promoted")["mlflow_run_id"]
    promote = PromoteOperator(
        task_id="promote",
        registered_model="promoted",
        checkpoint=stages.checkpoint(),
        candidacy_run_id=run_id,
        reason="It is better.",
    )
    stages.over_mlflow(promote).execute(stages.context("promoted"))
    night.copy.unlink()
    with pytest.raises(AirflowSkipException, match="This run has promoted models:/promoted/1"):
        night.prepare("promoted")
    assert not night.copy.exists()
    tags = night.tags("promoted")
    assert (tags["post_training.decision"], tags["post_training.reason"]) == ("promoted", "It is better.")


def test_a_night_that_is_cleared_forgets_what_was_decided(night: Night) -> None:
    run_id = night.prepare("cleared")["mlflow_run_id"]
    night.stages.client.set_tag(run_id, "post_training.decision", "rejected")
    night.prepare("cleared")
    assert "post_training.decision" not in night.tags("cleared")


def test_stages_without_a_new_row_are_left_out(night: Night) -> None:
    result = prepared()
    result["sources"]["pairs"]["files"]["train"] = None
    data = {**config()["data"], "rows": "new"}
    training = {**TRAINING, "max_steps_per_epoch": 0}
    stages = {
        name: {**config()[name], "training_config": training}
        for name in ("supervised_fine_tune", "preference_optimize")
    }
    outcome = night.prepare("no-pairs", result, data=data, quantize=None, **stages)
    assert list(outcome["requests"]) == ["supervised_fine_tune"]
    assert "preference_optimize" in night.skipped


def test_what_was_trained_on_and_where_to_start_is_the_champions(night: Night) -> None:
    tags = {"post_training.trained": TRAINED}
    night.stages.register("champ", {"champion": 1}, **tags)
    model = {"name": "champ", "base": "org/model", "start_from": "champion"}
    outcome = night.prepare("from-champion", model=model)
    assert night.spec["trained"] == TRAINED
    assert (outcome["start"], outcome["base"]) == ("models:/champ/1", "org/model")
    assert outcome["lineage"]["post_training.replaces"] == "models:/champ/1"
    assert night.spec["starts_from_trained"] is True


def test_dotted_keys_are_a_configuration_too(night: Night) -> None:
    flat = {
        "model.name": "flat",
        "model.base": "org/model",
        "data.dataset_id": "rows.jsonl",
        "data.evaluation_fraction": 0.5,
        "supervised_fine_tune": config()["supervised_fine_tune"],
        "preference_optimize": None,
    }
    night.leaves(prepared())
    operator = night.stages.over_mlflow(PrepareRetrainingOperator(task_id="prepare", config=flat))
    outcome = operator.execute(night.stages.context("flat"))
    assert outcome["registered_model"] == "flat"
    assert night.spec["split"]["evaluation_fraction"] == 0.5


def test_a_night_without_a_new_row_is_skipped(night: Night) -> None:
    night.stages.register("empty", {"champion": 1})
    with pytest.raises(AirflowSkipException, match="No row of the data is new since the last promotion"):
        night.prepare("empty", prepared(new_rows=0))
    tags = night.tags("empty")
    assert (tags["status"], tags["post_training.decision"]) == ("RUNNING", "skipped")
    assert tags["post_training.reason"].startswith("No row of the data is new")


def test_a_skipped_night_keeps_no_copy_of_the_data(night: Night) -> None:
    client = night.stages.client
    night.stages.register("skips", {"champion": 1})
    run_id = night.prepare("skips")["mlflow_run_id"]
    for part, name in product(("train", "validation", "evaluation"), SOURCES):
        client.log_text(run_id, "", f"data/{name}.{part}.jsonl")
    client.log_text(run_id, "", "data/trained.digests")
    with pytest.raises(AirflowSkipException):
        night.prepare("skips", prepared(new_rows=0))
    assert [file.path for file in client.list_artifacts(run_id, "data")] == ["data/trained.digests"]


def test_data_that_cannot_be_deleted_does_not_keep_a_night_from_being_skipped(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run_id: str, files: list[str]) -> None:
        raise RecordUnavailableError("MLflow does not answer")

    monkeypatch.setattr(night.stages.tracking, "delete_files", refuse)
    night.stages.register("stays", {"champion": 1})
    with pytest.raises(AirflowSkipException, match="No row of the data is new"):
        night.prepare("stays", prepared(new_rows=0))


def test_what_was_rejected_before_is_not_trained_again(night: Night) -> None:
    model = {"name": "again", "base": "org/model"}
    first = night.prepare("decided", model=model)
    night.prepare("same-undecided", model=model)
    night.stages.client.set_tag(first["mlflow_run_id"], "post_training.decision", "rejected")
    with pytest.raises(AirflowSkipException, match=f"were rejected in MLflow run {first['mlflow_run_id']}"):
        night.prepare("same", model=model)
    data = {**config()["data"], "skip_unchanged": False}
    night.prepare("on-purpose", model=model, data=data)
    night.prepare("other-configuration", model=model, checkpoint="last")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"train": None}, "the training part of the rows is empty: supervised_fine_tune cannot train"),
        ({"evaluation": None}, "the evaluation part of the rows is empty"),
        ({"validation": None}, "the validation part of the rows is empty"),
    ],
)
def test_an_empty_part_fails_for_good(night: Night, files: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AirflowFailException, match=sentence):
        night.prepare(f"empty-{next(iter(files))}", prepared(**files))


@pytest.mark.parametrize("rows", ["all", "new"])
def test_a_first_night_without_a_row_to_train_on_does_not_speak_of_a_promotion(
    night: Night, rows: str
) -> None:
    training = {**TRAINING, "max_steps_per_epoch": 0}
    stages = {name: {**config()[name], "training_config": training} for name in STAGES}
    data = {**config()["data"], "rows": rows}
    with pytest.raises(AirflowFailException, match="the training part of the rows is empty"):
        night.prepare(f"first-{rows}", prepared(new_rows=0, train=None), data=data, **stages)


@pytest.mark.parametrize("part", ["evaluation", "validation"])
def test_a_part_that_is_empty_since_all_of_it_was_trained_on_says_so(night: Night, part: str) -> None:
    name = f"known-{part}"
    night.stages.register(name, {"champion": 1}, **{"post_training.trained": TRAINED})
    result = prepared(**{part: None})
    result["sources"]["rows"]["kept"] = {part: 7}
    data = {**config()["data"], f"{part}_fraction": 0.3}
    with pytest.raises(
        AirflowFailException,
        match=rf"the {part} part of the rows is empty: models:/{name}/1 was trained on all 7 that"
        rf" data\.{part}_fraction 0\.3 puts there",
    ):
        night.prepare(name, result, data=data)


@pytest.mark.parametrize(("trained", "refused"), [(4, False), (5, True)])
def test_own_data_must_not_all_be_trained_on(night: Night, trained: int, refused: bool) -> None:
    name = f"own-{trained}"
    night.stages.register(name, {"champion": 1})
    night.stages.file("own.jsonl")
    result = {**prepared(), "held_out": {"rows": {"rows": 5, "trained": trained, "digest": "d"}}}
    sections = {
        "data": {**config()["data"], "evaluation_fraction": 0.0},
        "evaluation": {"dataset_id": "own.jsonl"},
    }
    if not refused:
        night.prepare(name, result, **sections)
        assert night.metrics(name)["own_rows/trained_on"] == trained
        return
    with pytest.raises(
        AirflowFailException,
        match=r"evaluation\.dataset_id must have questions that models:/own-5/1 was not trained on: it was on"
        " those of all 5 rows",
    ):
        night.prepare(name, result, **sections)


def test_what_became_of_the_rows_is_in_mlflow(night: Night) -> None:
    result = prepared()
    result["sources"]["rows"] |= {"kept": {"evaluation": 2}, "skipped": 1, "held_out": 4}
    night.prepare("counted", result)
    assert (
        night.metrics("counted").items()
        >= {
            "rows/train": 5,
            "rows/evaluation": 5,
            "rows/kept_out_of_evaluation": 2,
            "rows/kept_out_of_validation": 0,
            "rows/new_rows": 3,
            "rows/skipped": 1,
            "rows/held_out": 4,
            "pairs/kept_out_of_evaluation": 0,
        }.items()
    )


def test_a_champion_that_was_deleted_is_an_error(night: Night) -> None:
    stages = night.stages
    promote = PromoteOperator(
        task_id="promote",
        registered_model="deleted",
        checkpoint=stages.checkpoint(),
        candidacy_run_id=stages.client.create_run("0").info.run_id,
    )
    stages.over_mlflow(promote).execute(stages.context("promotes"))
    stages.client.delete_model_version("deleted", "1")
    with pytest.raises(AirflowFailException, match="the champion of 'deleted', version 1, was deleted"):
        night.prepare("after-deletion", model={"name": "deleted", "base": "org/model"})
    assert night.tags("after-deletion")["status"] == "FAILED"


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"data": {"dataset_id": "gone.jsonl", "preference_dataset_id": "pairs.jsonl"}},
            "data.dataset_id: no",
        ),
        ({"quantize": {"training_config": {"n_epochs": 0}}}, "quantize.training_config.n_epochs: "),
        ({"model": {"name": "x", "base": "/etc"}}, "model.base: must lie under"),
        (
            {
                "data": {**config()["data"], "evaluation_fraction": 0.0},
                "evaluation": {"dataset_id": "no.jsonl"},
            },
            "evaluation.dataset_id: no such file",
        ),
    ],
)
def test_a_wrong_configuration_names_the_field(night: Night, sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AirflowFailException, match=sentence):
        night.prepare(f"wrong-{len(sentence)}", **sections)


def test_data_that_cannot_be_read_for_now_is_tried_again(night: Night) -> None:
    with pytest.raises(AirflowException, match="cannot reach"):
        night.prepare("later", {"status": "failed", "error": "cannot reach it"})


def checkpoints(*losses: float) -> dict[str, Any]:
    """What a training task returns: a checkpoint for each epoch."""
    return {
        "checkpoints": [
            {"path": f"models:/m-{loss}", "training_metrics": {"validation_loss": loss}} for loss in losses
        ]
    }


@pytest.mark.parametrize(("which", "model"), [("best", "models:/m-1.0"), ("last", "models:/m-2.0")])
def test_a_stage_starts_from_the_checkpoint_of_the_one_before(which: str, model: str) -> None:
    night = {
        "checkpoint": which,
        "start": "org/model",
        "requests": {stage: {"logger_config": {}} for stage in STAGES},
    }
    pulled = {"prepare": night, "supervised_fine_tune": checkpoints(1.0, 2.0)}
    ti = SimpleNamespace(xcom_pull=lambda task_ids: pulled.get(task_ids))
    assert stage_request(ti, "supervised_fine_tune") == {"logger_config": {}, "model": "org/model"}
    assert stage_request(ti, "preference_optimize") == {"logger_config": {}, "finetuned_model": model}
    assert stage_request(ti, "quantize")["model"] == model  # preference_optimize was left out
    assert candidate(ti) == model
    pulled["preference_optimize"] = checkpoints(0.5)
    assert stage_request(ti, "quantize")["model"] == candidate(ti) == "models:/m-0.5"


def conclude(
    stages: StageWorkplace, run_id: str, states: dict[str, str], pulled: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Conclude a night whose tasks ended so."""
    operator = stages.over_mlflow(ConcludeRetrainingOperator(task_id="conclude"))
    context = stages.context(run_id, pulled=pulled)
    context["ti"].get_task_states = lambda dag_id, run_ids: {run_ids[0]: states}
    return dict(operator.execute(context))


def test_a_night_is_summed_up(night: Night) -> None:
    parent = night.prepare("summed")["mlflow_run_id"]
    client = night.stages.client
    for metrics in (
        {"device_seconds": 2.5, "job_tokens": 100},
        {"device_seconds": 1.5},  # an evaluation trains none
        {"search_device_seconds": 8.0, "search_tokens": 400},  # a stage that takes a trial's checkpoint
    ):
        child = client.create_run("0", tags={"mlflow.parentRunId": parent})
        for name, value in metrics.items():
            client.log_metric(child.info.run_id, name, value)
    client.set_tag(parent, "post_training.decision", "promoted")
    client.set_tag(parent, "post_training.reason", "It is better.")
    outcome = conclude(night.stages, "summed", {"promote": "success"})
    assert outcome == {
        "mlflow_run_id": parent,
        "decision": "promoted",
        "reason": "It is better.",
        "device_seconds": 12.0,
        "job_tokens": 500.0,
    }
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.metrics.items() >= {"device_seconds": 12.0, "job_tokens": 500.0}.items()


def test_a_failure_is_the_reason(night: Night) -> None:
    parent = night.prepare("broke")["mlflow_run_id"]
    error = {
        "mlflow.parentRunId": parent,
        "post_training.error": "Row 3 is bad.",
        "airflow.task_id": "supervised_fine_tune",
    }
    night.stages.client.create_run("0", tags=error)
    left = error | {"post_training.error": "left", "post_training.job_uuid": "x (superseded)"}
    night.stages.client.create_run("0", tags=left)
    night.stages.client.set_tag(parent, "post_training.error", "of an attempt before")
    outcome = conclude(
        night.stages, "broke", {"supervised_fine_tune": "failed", "promote": "upstream_failed"}
    )
    assert (outcome["decision"], outcome["reason"]) == (
        "failed",
        "supervised_fine_tune failed: Row 3 is bad.",
    )
    assert night.tags("broke")["status"] == "FAILED"


@pytest.mark.parametrize(
    ("states", "decision", "sentence"),
    [
        ({"quantize_plan": "failed", "promote": "upstream_failed"}, "failed", "quantize_plan failed: Bad."),
        ({"quantize_trials_0": "failed", "promote": "success"}, "promoted", "It is better."),
    ],
)
def test_a_plan_fails_a_night_and_a_worker_alone_does_not(
    night: Night, states: dict[str, str], decision: str, sentence: str
) -> None:
    parent = night.prepare(f"planned-{decision}")["mlflow_run_id"]
    job = {
        "mlflow.parentRunId": parent,
        "post_training.error": "Bad.",
        "airflow.task_id": "quantize",
    }
    night.stages.client.create_run("0", tags=job)
    if decision == "promoted":
        night.stages.client.set_tag(parent, "post_training.decision", "promoted")
        night.stages.client.set_tag(parent, "post_training.reason", "It is better.")
    outcome = conclude(night.stages, f"planned-{decision}", states)
    assert (outcome["decision"], outcome["reason"]) == (decision, sentence)


def test_a_preparation_that_failed_is_the_reason_too(night: Night) -> None:
    with pytest.raises(AirflowFailException, match="must lie under"):
        night.prepare("unprepared", model={"name": "x", "base": "/etc"})
    outcome = conclude(night.stages, "unprepared", {"prepare": "failed", "promote": "upstream_failed"})
    assert outcome["reason"].startswith("prepare failed: model.base: must lie under")


@pytest.mark.parametrize(
    ("answer", "decision", "sentence"),
    [
        ({"responded_by_user": {"id": "1", "name": "Ada"}}, "rejected", "but Ada did not approve it."),
        ({"responded_by_user": None}, "expired", "but nobody has approved it in time."),
    ],
)
def test_what_was_not_approved_is_not_promoted(
    night: Night, answer: Any, decision: str, sentence: str
) -> None:
    parent = night.prepare(decision)["mlflow_run_id"]
    night.stages.client.set_tag(parent, "post_training.decision", "accepted")
    states = {"approve": "success", "promote": "skipped"}
    outcome = conclude(night.stages, decision, states, {"approve": answer})
    assert outcome["decision"] == decision
    assert outcome["reason"].endswith(sentence)


@pytest.mark.parametrize("state", ["skipped", "success", "upstream_failed"])
def test_a_promotion_that_somebody_set_by_hand_is_none(night: Night, state: str) -> None:
    parent = night.prepare(f"by-hand-{state}")["mlflow_run_id"]
    night.stages.client.set_tag(parent, "post_training.decision", "accepted")
    outcome = conclude(night.stages, f"by-hand-{state}", {"approve": "skipped", "promote": state})
    assert (outcome["decision"], outcome["reason"]) == (
        "failed",
        f"The gates accepted the candidate, but promote is {state}.",
    )


def test_a_night_that_prepared_nothing_is_concluded_too(stages: StageWorkplace) -> None:
    outcome = conclude(stages, "never-prepared", {"prepare": "failed"})
    assert outcome["decision"] == "failed"
    assert StageRuns(stages.tracking).children(outcome["mlflow_run_id"]) == []
