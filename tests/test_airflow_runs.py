"""Jobs in a real metadata database (SQLite), with the real DAGs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from post_training.errors import InvalidRequestError, RecordUnavailableError
from post_training.job_ids import TaskKey
from post_training.schemas.flat import flatten
from post_training.schemas.requests import SupervisedFineTuneRequest
from tests.requests_of import sft_body

DAGS = Path(__file__).resolve().parents[1] / "dags"
CONF = flatten(SupervisedFineTuneRequest.model_validate(sft_body()))
NIGHTLY = """
from airflow.sdk import DAG
from airflow.providers.standard.operators.empty import EmptyOperator
from post_training.operators.training import SupervisedFineTuneOperator
with DAG("team.nightly", schedule=None):
    SupervisedFineTuneOperator(task_id="sft") >> EmptyOperator(task_id="after")
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
    assert runs.dag_ids() == {"supervised_fine_tune", "preference_optimize", "team.nightly"}


def test_the_list_is_newest_first_and_of_these_dags_alone(runs: Any) -> None:
    for name in ("list-1", "list-2"):
        runs.trigger("supervised_fine_tune", name, CONF, None)
    found = runs.job_uuids({"supervised_fine_tune"})
    assert found[:2] == ["list-2", "list-1"]
    assert runs.job_uuids({"preference_optimize"}) == []


def test_a_cancelled_job_has_failed_in_airflow(runs: Any) -> None:
    runs.trigger("supervised_fine_tune", "stop-me", CONF, None)
    runs.cancel(runs.find("stop-me").key)
    assert runs.find("stop-me").state in ("failed", "skipped")


def test_cancelling_a_stage_leaves_the_rest_of_its_dag_alone(runs: Any) -> None:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    runs.trigger("team.nightly", "run.2", {}, None)
    runs.cancel(runs.find("team.nightly.run.2.sft").key)
    assert runs.find("team.nightly.run.2.sft").state == "failed"
    with create_session() as session:
        run = session.query(DagRun).filter_by(dag_id="team.nightly", run_id="run.2").one()
        assert run.state == "queued"
        assert run.get_task_instance("after", session=session).state is None


def test_a_job_that_has_not_begun_has_no_log(runs: Any) -> None:
    runs.trigger("supervised_fine_tune", "quiet", CONF, None)
    assert runs.log_lines(runs.find("quiet")) == []
