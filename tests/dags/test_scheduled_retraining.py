"""The DAG of a scheduled retraining: what it is made of, and what its file and its form say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, Asset, AssetAny, AssetOrTimeSchedule, CronTriggerTimetable

from post_training.errors import InvalidRequestError
from post_training.operators.retraining import read_config
from post_training.operators.retraining_params import load_retraining, retraining_schedule
from post_training.schemas.retraining import STAGES, RetrainingConfig

DAGS = Path(__file__).resolve().parents[2] / "dags"
FILE = DAGS / "scheduled_retraining.yaml"


@pytest.fixture(scope="module")
def dag() -> DAG:
    bag = DagBag(DAGS / "scheduled_retraining.py")
    assert bag.import_errors == {}
    return bag.dags["scheduled_retraining"]


def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changed: tuple[str, str]) -> Path:
    """Write a copy of the file with texts replaced, and let the setting name it."""
    text = FILE.read_text()
    for old, new in changed.values():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "own.yaml"
    path.write_text(text)
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RETRAINING_CONFIG", str(path))
    return path


def test_nothing_runs_before_a_user_has_switched_it_on(dag: DAG) -> None:
    assert dag.is_paused_upon_creation is None  # Airflow's own default: paused
    assert (dag.max_active_runs, dag.catchup) == (1, False)


def test_what_may_be_left_out_is_directly_behind_the_preparation(dag: DAG) -> None:
    assert {*STAGES, "approve"} <= dag.get_task("prepare").downstream_task_ids
    assert dag.get_task("conclude").is_teardown
    assert dag.get_task("evaluate").upstream_task_ids == {"prepare", *STAGES}
    assert dag.get_task("quantize").upstream_task_ids == {"prepare", *list(STAGES)[:2]}
    assert dag.get_task("gate").downstream_task_ids == {"approve", "promote"}


def test_a_stage_that_searches_has_its_tasks_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = """
  hyperparam_search_config:
    space: {training_config.optimizer_config.lr: {type: float, low: 1.0e-5, high: 1.0e-3, log: true}}
    n_trials: 4
"""
    settings(tmp_path, monkeypatch, search=("    alpha: 32\n", f"    alpha: 32{search}"))
    bag = DagBag(DAGS / "scheduled_retraining.py")
    assert bag.import_errors == {}
    dag = bag.dags["scheduled_retraining"]
    plan, train = dag.get_task("supervised_fine_tune_plan"), dag.get_task("supervised_fine_tune")
    assert plan.upstream_task_ids == {"prepare"}
    assert train.upstream_task_ids == {"supervised_fine_tune_plan", "supervised_fine_tune_trials"}
    assert dag.get_task("preference_optimize").upstream_task_ids == {"prepare", "supervised_fine_tune"}
    assert dag.get_task("evaluate").upstream_task_ids == {"prepare", *STAGES}
    assert plan.parent_run_id == train.parent_run_id
    assert not plan.required, "the form may leave the search out"


def test_the_forms_defaults_are_the_files(dag: DAG) -> None:
    params = copy.deepcopy(dag.params).validate()
    file = load_retraining(FILE)
    given = {name: getattr(file, name) for name in RetrainingConfig.model_fields}
    assert read_config(params) == RetrainingConfig.model_construct(**given)
    for path, param in dag.params.items():
        assert param.description, path
        assert param.schema["section"], path


def test_a_run_may_change_what_it_does(dag: DAG) -> None:
    params = copy.deepcopy(dag.params)
    params.update(
        {
            "data.rows": "new",
            "evaluation.exact_match.pattern": "#### *(-?[0-9.,]+)",
            "gate.gates": [{"metric": "exact_match", "at_least": 0.2}],
        }
    )
    config = read_config(params.validate())
    assert config.data.rows == "new"
    assert config.evaluation.exact_match is not None
    assert config.evaluation.exact_match.pattern == "#### *(-?[0-9.,]+)"
    assert [gate.metric for gate in config.gate.gates] == ["exact_match"]


def test_what_airflow_fixes_with_the_dag_no_run_can_change(dag: DAG) -> None:
    assert "approval.timeout_hours" not in dag.params
    with pytest.raises(InvalidRequestError, match="timeout_hours: is fixed by the file of the DAG"):
        read_config({**copy.deepcopy(dag.params).validate(), "approval.timeout_hours": 1})


@pytest.mark.parametrize(
    ("cron", "assets", "kind"),
    [
        ('"0 2 * * *"', "[]", CronTriggerTimetable),
        ('"0 2 * * *"', '["x-team://rows"]', AssetOrTimeSchedule),
        ("null", '["x-team://rows", "x-post-training://datasets/pairs"]', AssetAny),
        ("null", "[]", type(None)),
    ],
)
def test_a_time_or_an_asset_wakes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cron: str, assets: str, kind: type
) -> None:
    settings(tmp_path, monkeypatch, cron=('"0 2 * * *"', cron), assets=("assets: []", f"assets: {assets}"))
    schedule = retraining_schedule(load_retraining(FILE))
    assert isinstance(schedule, kind)
    if isinstance(schedule, AssetAny):  # another DAG's may have a name of its own, which ours may not take
        ours = Asset("x-post-training://datasets/pairs")
        assert list(schedule.objects) == [Asset.ref(uri="x-team://rows"), ours]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (("n_epochs: 2", "n_epochs: 0"), "own.yaml.supervised_fine_tune.training_config.n_epochs: "),
        (("timezone: UTC", "timezone: Mars"), "own.yaml.schedule.timezone: must be a time zone"),
        (("rows: all", "rows: some"), "own.yaml.data.rows: Input should be 'all' or 'new'"),
        (("model:", "modle:"), "own.yaml.modle: Extra inputs"),
        (("schedule:", "schedule: ["), "retraining_config: cannot be read"),
    ],
)
def test_a_wrong_file_names_the_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: Any, sentence: str
) -> None:
    settings(tmp_path, monkeypatch, changed=changed)
    with pytest.raises(InvalidRequestError, match=sentence):
        load_retraining(FILE)
