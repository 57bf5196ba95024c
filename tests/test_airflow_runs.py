"""Jobs in a real metadata database (SQLite), with the real DAGs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from post_training.errors import InvalidRequestError, JobConflictError, RecordUnavailableError
from post_training.job_ids import REQUEST_DAGS, TaskKey
from post_training.schemas.flat import flatten
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from tests.requests_of import LORA, dpo_body, sft_body
from tests.waiting import wait_until

DAGS = Path(__file__).resolve().parents[1] / "dags"
CONF = flatten(SupervisedFineTuneRequest.model_validate(sft_body()))
NIGHTLY = """
from airflow.sdk import DAG, Asset
from airflow.providers.standard.operators.empty import EmptyOperator
from post_training.operators.search import search_before
from post_training.operators.training import SupervisedFineTuneOperator
class HouseTuner(SupervisedFineTuneOperator): ...
tickets = Asset("x-post-training://datasets/tickets")
with DAG("team.waiting", schedule=[tickets], is_paused_upon_creation=False):
    EmptyOperator(task_id="waits")
with DAG("team.nightly", schedule=None):
    SupervisedFineTuneOperator(task_id="sft") >> EmptyOperator(task_id="after")
    HouseTuner(task_id="own")
    HouseTuner.partial(task_id="many", pool="default_pool").expand(request=[{}, {}])
    searched = SupervisedFineTuneOperator(task_id="best")
    search_before(searched) >> EmptyOperator(task_id="beside")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The access to a database that knows our DAGs and one that uses our operator."""
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    from airflow.models.dagbundle import DagBundleModel
    from airflow.utils.db import initdb
    from airflow.utils.session import create_session

    from post_training.airflow_runs import AirflowRuns

    folder = tmp_path_factory.mktemp("dags")
    (folder / "nightly.py").write_text(NIGHTLY)
    initdb()
    with create_session() as session:
        session.merge(DagBundleModel(name="tests"))
        session.flush()
        for path in (DAGS, folder):
            sync_bag_to_db(DagBag(path, bundle_name="tests"), "tests", None, session=session)
    return AirflowRuns()


def test_a_triggered_job_is_found_with_its_conf(runs: Any) -> None:
    runs.trigger("supervised_fine_tune", "found", CONF, "somebody")
    task = runs.find("found")
    assert task.key == TaskKey("supervised_fine_tune", "found", "train")
    assert task.job_uuid == "found"
    assert (task.state, task.attempt, task.started_at) == (None, 0, None)
    assert task.scheduled_at is not None
    assert task.conf == CONF
    assert runs.find("nobody") is None
    assert runs.find("\ud800") is None
    assert runs.find("team.nightly." + "1." * 450 + "1") is None
    assert runs.find("team.nightly." + "1." * 5000) is None
    assert runs.find("team.nightly.1.many." + "9" * 20) is None


def test_a_second_run_of_the_same_id_is_told_apart(runs: Any) -> None:
    from post_training.airflow_runs import RunExistsError

    runs.trigger("supervised_fine_tune", "twice", CONF, None)
    with pytest.raises(RunExistsError):
        runs.trigger("supervised_fine_tune", "twice", CONF, None)


def test_of_many_at_once_one_wins(runs: Any) -> None:
    from post_training.airflow_runs import RunExistsError

    def attempt(_: int) -> str:
        try:
            runs.trigger("supervised_fine_tune", "race", CONF, None)
        except RunExistsError:
            return "exists"
        return "triggered"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(attempt, range(8)))
    assert sorted(outcomes) == ["exists"] * 7 + ["triggered"]


def test_a_bad_conf_and_an_unknown_dag(runs: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"conf: .*training_config\.n_epochs"):
        runs.trigger("supervised_fine_tune", "bad", {**CONF, "training_config.n_epochs": 0}, None)
    assert runs.find("bad") is None
    with pytest.raises(RecordUnavailableError, match="has not read the DAG 'unknown'"):
        runs.trigger("unknown", "unknown", {}, None)


def test_a_stage_of_a_larger_dag_is_a_job_too(runs: Any) -> None:
    runs.trigger("team.nightly", "run.1", {}, None)
    assert runs.find("team.nightly.run.1.sft").key == TaskKey("team.nightly", "run.1", "sft")
    assert runs.find("team.nightly.run.1.after") is None
    assert "team.nightly.run.1.sft" in runs.job_uuids({"team.nightly"})
    request_dags = set(REQUEST_DAGS)
    assert runs.dag_ids() == {*request_dags, "team.nightly"}
    assert runs.dag_ids(prefix_of="team.nightly.run.1.sft") == {*request_dags, "team.nightly"}
    assert runs.dag_ids(prefix_of="team.weekly.run.1.sft") == request_dags


def test_an_update_of_an_asset_is_queued_for_the_dags_that_wait_for_it(runs: Any) -> None:
    from airflow.models.asset import AssetDagRunQueue, AssetEvent
    from airflow.utils.session import create_session

    runs.update_asset("x-post-training://datasets/unknown", {})
    runs.update_asset("x-post-training://datasets/tickets", {"dataset": "tickets@1f3a"})
    with create_session() as session:
        assert [event.extra for event in session.query(AssetEvent)] == [{"dataset": "tickets@1f3a"}]
        assert [waits.target_dag_id for waits in session.query(AssetDagRunQueue)] == ["team.waiting"]


def test_a_stage_that_was_left_out_is_no_job_and_one_that_was_skipped_later_is(runs: Any) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    for name, tries in (("left-out", 0), ("skipped-later", 1)):
        runs.trigger("team.nightly", name, {}, None)
        with create_session() as session:
            task = session.query(TaskInstance).filter_by(run_id=name, task_id="sft").one()
            task.state, task.try_number = "skipped", tries
    listed = runs.job_uuids({"team.nightly"})
    assert runs.find("team.nightly.left-out.sft") is None
    assert "team.nightly.left-out.sft" not in listed
    assert runs.find("team.nightly.skipped-later.sft").state == "skipped"
    assert "team.nightly.skipped-later.sft" in listed


@pytest.mark.parametrize(("name", "map_index"), [("own", -1), ("many.0", 0), ("many.1", 1)])
def test_a_task_of_a_users_subclass_is_a_job_too(runs: Any, name: str, map_index: int) -> None:
    runs.trigger("team.nightly", f"subclass-{name}", {}, None)
    job_uuid = f"team.nightly.subclass-{name}.{name}"
    assert runs.find(job_uuid).key.map_index == map_index
    assert job_uuid in runs.job_uuids({"team.nightly"})


def test_how_far_a_task_and_its_run_have_come_be_it_a_job_or_not(runs: Any) -> None:
    from airflow.models.dagrun import DagRun
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    from post_training.airflow_runs import Progress

    key = TaskKey("team.nightly", "progress", "after")
    assert (runs.progress(key), runs.progress(key, of_run=True)) == (None, None)
    runs.trigger("team.nightly", "progress", {}, None)
    assert runs.progress(key) == Progress(None, None)
    assert runs.progress(key, of_run=True) == Progress("queued", None)
    at = datetime(2026, 11, 28, tzinfo=UTC)
    with create_session() as session:
        rows = session.query(TaskInstance).filter_by(run_id="progress")
        rows.filter_by(task_id="after").update({"state": "failed", "end_date": at})
        rows.filter_by(task_id="many", map_index=1).update({"state": "skipped"})
        session.query(DagRun).filter_by(run_id="progress").update({"state": "success", "end_date": at})
    assert runs.progress(key) == Progress("failed", at)
    assert runs.progress(key, of_run=True) == Progress("success", at)
    assert runs.progress(TaskKey("team.nightly", "progress", "many", 1)) == Progress("skipped", None)
    with create_session() as session:
        session.delete(session.query(DagRun).filter_by(run_id="progress").one())
    assert (runs.progress(key), runs.progress(key, of_run=True)) == (None, None)


def test_the_list_is_newest_first_and_of_these_dags_alone(runs: Any) -> None:
    for name in ("list-1", "list-2"):
        runs.trigger("supervised_fine_tune", name, CONF, None)
    found = runs.job_uuids({"supervised_fine_tune"})
    assert found[:2] == ["list-2", "list-1"]
    assert runs.job_uuids({"preference_optimize"}) == []


def page_of(
    runs: Any, *dag_ids: str, offset: int = 0, limit: int = 100, **wanted: Any
) -> tuple[list[str], int]:
    from post_training.airflow_runs import JobFilter

    tasks, total = runs.page(JobFilter(set(dag_ids), **wanted), offset, limit)
    return [task.job_uuid for task in tasks], total


def test_a_page_is_some_of_the_list_and_says_how_many_there_are(runs: Any) -> None:
    dag_id = "supervised_fine_tune_search"
    for number in range(5):
        runs.trigger(dag_id, f"paged-{number}", CONF, None)
    everything, total = page_of(runs, dag_id, text="paged-")
    assert everything == [f"paged-{number}" for number in (4, 3, 2, 1, 0)]
    assert total == 5
    assert page_of(runs, dag_id, text="paged-", offset=1, limit=2) == (["paged-3", "paged-2"], 5)
    assert page_of(runs, dag_id, text="paged-", offset=5) == ([], 5)
    assert page_of(runs, "unknown") == ([], 0)


@contextmanager
def statements() -> Iterator[list[str]]:
    """What is asked of the database meanwhile."""
    from sqlalchemy import Engine, event

    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def test_every_conf_is_searched_once_and_none_is_read_to_count(runs: Any) -> None:
    with statements() as asked:
        page_of(runs, "supervised_fine_tune", text="no such text")
    assert sum("LIKE" in statement for statement in asked) == 1
    with statements() as asked:
        page_of(runs, "supervised_fine_tune")
    (counts,) = [statement for statement in asked if "count(" in statement]
    assert "dag_run" not in counts


def test_a_page_is_of_one_dag_run(runs: Any) -> None:
    runs.trigger("team.nightly", "tab", {}, None)
    found, total = page_of(runs, "team.nightly", run_id="tab")
    assert sorted(found) == [
        f"team.nightly.tab.{name}" for name in ("best", "many.0", "many.1", "own", "sft")
    ]
    assert total == 5
    assert page_of(runs, "team.nightly", text="team.nightly.tab.many.1") == (["team.nightly.tab.many.1"], 1)


@pytest.mark.parametrize(
    "text", ["NEEDLE-1", "needle-1", "org/Größe", "größe", 'a "quoted" 100%_', "needles.jsonl", "qat"]
)
def test_a_text_is_found_in_id_and_conf(runs: Any, text: str) -> None:
    if runs.find("needle-1") is None:
        conf = {**CONF, "model": "org/Größe", "checkpoint_dir": 'a "quoted" 100%_'}
        conf |= {"training_config.data_config.dataset_id": "needles.jsonl", "algorithm_config.type": "QAT"}
        runs.trigger("supervised_fine_tune", "needle-1", conf, None)
        runs.trigger("supervised_fine_tune", "hay", {**CONF, "checkpoint_dir": 'a "quoted" 1000'}, None)
    assert page_of(runs, "supervised_fine_tune", text=text) == (["needle-1"], 1)


def test_a_text_is_found_in_the_names_that_algorithms_have_on_the_page(runs: Any) -> None:
    from post_training.airflow_runs import JobFilter

    plain = {**CONF, "model": "named-algorithm"}
    adapters = {
        "named-lora": {},
        "named-dora": {"use_dora": True},
        "named-qlora": {"use_dora": False, "quantize_base": True},
        "named-qdora": {"use_dora": True, "quantize_base": True},
    }
    for run_id, fields in adapters.items():
        conf = plain | {f"algorithm_config.{name}": value for name, value in fields.items()}
        runs.trigger("supervised_fine_tune", run_id, conf, None)
    pairs = flatten(
        PreferenceOptimizeRequest.model_validate(dpo_body(runtime={"adapter": LORA | {"use_dora": True}}))
    )
    runs.trigger("preference_optimize", "named-pairs", pairs, None)
    whole = plain | {name: None for name in plain if name.startswith("algorithm_config.")}
    runs.trigger("supervised_fine_tune", "named-whole", whole, None)
    runs.trigger("supervised_fine_tune", "named-qat", whole | {"algorithm_config.type": "QAT"}, None)
    named = {*adapters, "named-pairs", "named-whole", "named-qat"}

    def found(text: str) -> set[str]:
        tasks, _ = runs.page(JobFilter({"supervised_fine_tune", "preference_optimize"}, text=text), 0, 100)
        return {task.job_uuid for task in tasks if task.job_uuid in named}

    assert found("dpo") == {"named-pairs"}
    assert found("DoRA") == {"named-dora", "named-qdora", "named-pairs"}
    assert found("qdora") == {"named-qdora"}
    assert found("QLoRA") == {"named-qlora"}
    assert found("full fine") == {"named-whole"}


@pytest.mark.parametrize("text", ["dataset_id", "fine_tune", "rank"])
def test_the_names_of_dags_tasks_and_fields_find_no_request(runs: Any, text: str) -> None:
    if runs.find("hidden-1") is None:
        conf = {**CONF, "training_config.data_config.dataset_id": "rows.jsonl"}
        runs.trigger("supervised_fine_tune", "hidden-1", conf, None)
    assert page_of(runs, "supervised_fine_tune", text=text) == ([], 0)
    assert page_of(runs, "supervised_fine_tune", text="hidden")[1] == 1


def test_jobs_are_found_by_their_state(runs: Any) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    from post_training.schemas.jobs import JobStatus

    states = {
        "new": None,
        "queued": "queued",
        "running": "running",
        "between": "up_for_retry",
        "done": "success",
        "broken": "failed",
        "stopped": "failed",
        "left-out": "skipped",
    }
    for name in states:
        runs.trigger("supervised_fine_tune_search", f"state-{name}", CONF, None)
    runs.note_stop(runs.find("state-stopped").key, runs.find("state-stopped").attempt_id)
    runs.note_stop(runs.find("state-broken").key, "an-attempt-before")
    with create_session() as session:
        for name, state in states.items():
            query = session.query(TaskInstance).filter_by(run_id=f"state-{name}", task_id="train")
            query.one().state = state
    found = {
        status: set(page_of(runs, "supervised_fine_tune_search", status=status, text="state-")[0])
        for status in JobStatus
    }
    assert found == {
        JobStatus.scheduled: {"state-new", "state-queued"},
        JobStatus.in_progress: {"state-running", "state-between"},
        JobStatus.completed: {"state-done"},
        JobStatus.failed: {"state-broken"},
        JobStatus.cancelled: {"state-stopped", "state-left-out"},
    }


def test_a_cancelled_job_has_failed_in_airflow(runs: Any) -> None:
    runs.trigger("supervised_fine_tune", "stop-me", CONF, None)
    runs.cancel(runs.find("stop-me").key, "somebody")
    assert runs.find("stop-me").state in ("failed", "skipped")


def test_a_job_that_was_cancelled_before_its_task_began_is_one(runs: Any) -> None:
    """As one whose search was: its task is skipped and was never tried."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    runs.trigger("supervised_fine_tune", "stop-early", CONF, None)
    with create_session() as session:
        task = session.query(TaskInstance).filter_by(run_id="stop-early").one()
        task.state, task.try_number = "skipped", 0
    assert runs.find("stop-early").state == "skipped"
    assert "stop-early" in runs.job_uuids({"supervised_fine_tune"})


def test_cancelling_a_stage_leaves_the_rest_of_its_dag_alone(runs: Any) -> None:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    runs.trigger("team.nightly", "run.2", {}, None)
    runs.cancel(runs.find("team.nightly.run.2.sft").key, "somebody")
    assert runs.find("team.nightly.run.2.sft").state == "failed"
    with create_session() as session:
        run = session.query(DagRun).filter_by(dag_id="team.nightly", run_id="run.2").one()
        assert run.state == "queued"
        assert run.get_task_instance("after", session=session).state is None


def test_cancelling_a_job_ends_its_search(runs: Any) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    runs.trigger("team.nightly", "run.5", {}, None)
    planned = datetime(2026, 11, 1, tzinfo=UTC)
    with create_session() as session:
        tasks = session.query(TaskInstance).filter_by(run_id="run.5")
        tasks.filter_by(task_id="best_plan").update({"state": "success", "start_date": planned})
        tasks.filter_by(task_id="best_trials").update({"state": "running", "map_index": 0})
    job = runs.find("team.nightly.run.5.best")
    assert (job.started_at, job.searched, job.blocked) == (planned, True, False)
    runs.cancel(job.key, "somebody")
    with create_session() as session:
        rows = session.query(TaskInstance).filter_by(run_id="run.5")
        states = {row.task_id: row.state for row in rows}
    assert {name: state for name, state in states.items() if state} == {
        "best_plan": "success",
        "best_trials": "failed",
        "best": "failed",
    }


def test_cancelling_a_stage_starts_no_failed_task_behind_it(runs: Any) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    def after() -> tuple[str, str]:
        with create_session() as session:
            row = session.query(TaskInstance).filter_by(run_id="run.3", task_id="after").one()
            return str(row.id), row.state

    runs.trigger("team.nightly", "run.3", {}, None)
    with create_session() as session:
        tasks = session.query(TaskInstance).filter_by(run_id="run.3")
        tasks.filter_by(task_id="sft").update({"state": "running", "try_number": 1})
        tasks.filter_by(task_id="after").update({"state": "failed", "try_number": 1})
    before = after()
    runs.cancel(runs.find("team.nightly.run.3.sft").key, "somebody")
    assert runs.find("team.nightly.run.3.sft").state == "failed"
    assert after() == before


def test_of_a_mapped_task_one_job_alone_is_cancelled(runs: Any) -> None:
    runs.trigger("team.nightly", "run.4", {}, None)
    runs.cancel(runs.find("team.nightly.run.4.many.1").key, "somebody")
    assert [runs.find(f"team.nightly.run.4.many.{index}").state for index in (0, 1)] == [None, "failed"]


def test_a_cancel_is_in_airflows_audit_log_with_its_author(runs: Any) -> None:
    from airflow.models.log import Log
    from airflow.utils.session import create_session

    runs.trigger("supervised_fine_tune", "audited", CONF, None)
    assert not runs.was_stopped(runs.find("audited"))
    runs.cancel(runs.find("audited").key, "somebody")
    assert runs.was_stopped(runs.find("audited"))
    with create_session() as session:
        (entry,) = session.query(Log).filter_by(run_id="audited", event="stop_training_job")
        assert (entry.owner, entry.task_id) == ("somebody", "train")


def test_an_attempt_that_was_stopped_in_airflows_pages_is_known(runs: Any) -> None:
    runs.trigger("supervised_fine_tune", "by-hand", CONF, None)
    task = runs.find("by-hand")
    runs.note_stop(task.key, "00000000-0000-7000-8000-000000000000")
    assert not runs.was_stopped(task), "that was an attempt before"
    runs.note_stop(task.key, task.attempt_id)
    assert runs.was_stopped(task)


@pytest.mark.parametrize("name", ["sft", "own"])
def test_a_job_that_is_set_to_failed_by_hand_is_noted_as_stopped(runs: Any, name: str) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    from post_training.listener import on_task_instance_failed

    runs.trigger("team.nightly", f"by-hand-{name}", {}, None)
    task = runs.find(f"team.nightly.by-hand-{name}.{name}")
    with create_session() as session:
        row = session.query(TaskInstance).filter_by(run_id=f"by-hand-{name}", task_id=name).one()
        on_task_instance_failed(None, row, None)
    assert wait_until(lambda: runs.was_stopped(task))


def test_a_job_that_has_ended_meanwhile_is_not_stopped(runs: Any) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    runs.trigger("supervised_fine_tune", "done", CONF, None)
    with create_session() as session:
        session.query(TaskInstance).filter_by(run_id="done").update({"state": "success"})
    with pytest.raises(JobConflictError, match="'done' has ended"):
        runs.cancel(runs.find("done").key, "somebody")
    assert not runs.was_stopped(runs.find("done"))


def test_a_cleared_job_is_another_attempt_and_no_longer_stopped(runs: Any) -> None:
    from airflow.models.taskinstance import TaskInstance, clear_task_instances
    from airflow.utils.session import create_session

    runs.trigger("supervised_fine_tune", "cleared", CONF, None)
    runs.cancel(runs.find("cleared").key, "somebody")
    before = runs.find("cleared")
    with create_session() as session:
        clear_task_instances(list(session.query(TaskInstance).filter_by(run_id="cleared")), session)
    after = runs.find("cleared")
    assert after.scheduled_at == before.scheduled_at
    assert after.attempt_id > before.attempt_id
    assert not runs.was_stopped(after)


@pytest.mark.parametrize(("failed", "job"), [("sft", "sft"), ("best_plan", "best")])
def test_a_job_that_cannot_begin_is_blocked(runs: Any, failed: str, job: str) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    run_id = f"blocked-{job}"
    runs.trigger("team.nightly", run_id, {}, None)
    with create_session() as session:
        tasks = session.query(TaskInstance).filter_by(run_id=run_id, task_id=failed)
        tasks.update({"state": "upstream_failed"})
    found = runs.find(f"team.nightly.{run_id}.{job}")
    assert (found.blocked, found.searched, found.started_at) == (True, job != failed, None)
    assert not runs.find(f"team.nightly.{run_id}.own").blocked


def test_a_job_that_has_not_begun_has_no_log(runs: Any) -> None:
    runs.trigger("supervised_fine_tune", "quiet", CONF, None)
    assert list(runs.log_lines(runs.find("quiet").key, 1)) == []


def test_each_attempt_has_its_log(runs: Any) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.taskinstancehistory import TaskInstanceHistory
    from airflow.utils.session import create_session

    runs.trigger("supervised_fine_tune", "logged", CONF, None)
    key = runs.find("logged").key
    with create_session() as session:
        instance = session.query(TaskInstance).filter_by(dag_id=key.dag_id, run_id=key.run_id).one()
        instance.try_number, instance.state = 1, "failed"
        TaskInstanceHistory.record_ti(instance, session=session)
        instance.try_number, instance.state = 2, "running"
    failure = {"exc_type": "AirflowException", "exc_value": "the trainer was killed"}
    write_log(
        key,
        1,
        [
            {"event": "::group::Pre Execute"},
            {"event": "DAG bundles loaded"},
            {"event": "::endgroup::"},
            {"event": "progress step 1/9"},
            {"event": "Task failed with exception", "error_detail": [failure]},
            {"event": "of a library", "error_detail": "boom"},
            {"event": "of another", "error_detail": [{"reason": "boom"}]},
            {"event": "of a third", "error_detail": {"exc_type": "ValueError"}},
        ],
    )
    write_log(key, 2, [{"event": f"progress step {step}/20000"} for step in range(20_000)])
    assert list(runs.log_lines(key, 1)) == [
        "DAG bundles loaded",
        "progress step 1/9",
        "Task failed with exception: AirflowException: the trainer was killed",
        "of a library",
        "of another",
        "of a third",
    ]
    assert list(runs.log_lines(key, 2)) == [f"progress step {step}/20000" for step in range(20_000)]
    assert list(runs.log_lines(key, 3)) == []


def begun(runs: Any, job_uuid: str) -> TaskKey:
    """Trigger a job whose first attempt runs."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    runs.trigger("supervised_fine_tune", job_uuid, CONF, None)
    with create_session() as session:
        instance = session.query(TaskInstance).filter_by(run_id=job_uuid).one()
        instance.try_number, instance.state = 1, "running"
    key: TaskKey = runs.find(job_uuid).key
    return key


def test_lines_are_sorted_by_their_time_and_read_up_to_one(runs: Any) -> None:
    """The supervisor's line was in the log before an older one of its task."""
    key = begun(runs, "late")
    times = {"first": "1", "of the supervisor": "4Z", "late": "3Z"}
    write_log(
        key, 1, [{"event": event, "timestamp": f"2026-11-27T12:00:0{at}"} for event, at in times.items()]
    )
    assert list(runs.log_lines(key, 1)) == ["first", "late", "of the supervisor"]
    until = datetime(2026, 11, 27, 12, 0, 3, tzinfo=UTC)
    assert list(runs.log_lines(key, 1, until)) == ["first", "late"]


@pytest.mark.parametrize("state", ["running", "success"])
def test_the_log_of_a_job_on_another_machine_is_read_from_there(
    runs: Any, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.taskinstancehistory import TaskInstanceHistory
    from airflow.utils.session import create_session

    runs.trigger("supervised_fine_tune", f"far-{state}", CONF, None)
    key = runs.find(f"far-{state}").key
    with create_session() as session:
        instance = session.query(TaskInstance).filter_by(dag_id=key.dag_id, run_id=key.run_id).one()
        instance.try_number, instance.state, instance.hostname = 1, "failed", "localhost"
        TaskInstanceHistory.record_ti(instance, session=session)
        instance.try_number, instance.state = 2, state
    with worker_with_logs(monkeypatch):
        assert list(runs.log_lines(key, 1)) == [f"of run_id={key.run_id} attempt=1.log"]
        assert list(runs.log_lines(key, 2)) == [f"of run_id={key.run_id} attempt=2.log"]


@contextmanager
def worker_with_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve logs as a worker does: one line of each, which says whose it is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, run, _, attempt = self.path.removeprefix("/log/").split("/")
            line = {"timestamp": "2026-11-24T10:00:00Z", "event": f"of {run} {attempt}"}
            body = json.dumps(line).encode() + b"\n"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setenv("AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT", str(server.server_port))
    monkeypatch.setenv("AIRFLOW__API__SECRET_KEY", "shared-by-all-machines" * 3)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_log(key: TaskKey, attempt: int, messages: list[dict[str, Any]]) -> None:
    """Write an attempt's log where and as Airflow does."""
    from airflow.configuration import conf

    folder = Path(conf.get("logging", "base_log_folder"))
    folder = folder / f"dag_id={key.dag_id}" / f"run_id={key.run_id}" / f"task_id={key.task_id}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {"timestamp": f"2026-11-24T{n // 3600:02}:{n // 60 % 60:02}:{n % 60:02}.{n:06}Z", **message}
        )
        for n, message in enumerate(messages)
    ]
    (folder / f"attempt={attempt}.log").write_text("\n".join(lines) + "\n")


def test_a_pool_without_a_free_connection(tmp_path: Path) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.pool import QueuePool

    from post_training.airflow_runs import _database

    engine = create_engine(
        f"sqlite:///{tmp_path}/full.db", poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01
    )
    with engine.connect(), pytest.raises(RecordUnavailableError, match="no connection became free") as caught:
        with _database(), engine.connect():
            pass
    assert "QueuePool" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "becomes", "sentence"),
    [
        ("OperationalError", RecordUnavailableError, "Airflow's database is busy"),
        ("InterfaceError", RecordUnavailableError, "Airflow's database is busy"),
        ("DataError", InvalidRequestError, "request: Airflow's database cannot hold it: reason"),
    ],
)
def test_no_statement_is_shown(kind: str, becomes: type[Exception], sentence: str) -> None:
    import sqlalchemy.exc

    from post_training.airflow_runs import _database

    error = getattr(sqlalchemy.exc, kind)(
        "SELECT secret", {"a": "secret"}, Exception("reason\nDETAIL: secret")
    )
    with pytest.raises(becomes) as caught, _database():
        raise error
    assert str(caught.value) == sentence
