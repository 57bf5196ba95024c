"""The whole table of what a job is when MLflow and Airflow disagree."""

from __future__ import annotations

import pytest
from airflow.utils.state import TaskInstanceState

from post_training.reconcile import OF_MLFLOW, Verdict, reconcile
from post_training.schemas.jobs import JobStatus

MLFLOW = (None, *OF_MLFLOW)
WAITING = (None, "scheduled", "queued")
WORKING = ("running", "deferred", "awaiting_input", "restarting", "up_for_retry", "up_for_reschedule")
ENDED = {
    "success": ("FINISHED", JobStatus.completed),
    "failed": ("FAILED", JobStatus.failed),
    "upstream_failed": ("FAILED", JobStatus.failed),
    "skipped": ("KILLED", JobStatus.cancelled),
    "removed": ("KILLED", JobStatus.cancelled),
}


def test_every_task_state_of_airflow_is_in_the_table() -> None:
    assert {str(state) for state in TaskInstanceState} == {*WAITING, *WORKING, *ENDED} - {None}


@pytest.mark.parametrize("mlflow_status", MLFLOW)
@pytest.mark.parametrize("state", WAITING)
def test_a_waiting_task_is_a_scheduled_job(mlflow_status: str | None, state: str | None) -> None:
    assert reconcile(mlflow_status, state) == Verdict(JobStatus.scheduled)


@pytest.mark.parametrize("mlflow_status", MLFLOW)
@pytest.mark.parametrize("state", WORKING)
def test_a_working_task_is_a_job_in_progress(mlflow_status: str | None, state: str) -> None:
    assert reconcile(mlflow_status, state) == Verdict(JobStatus.in_progress)


@pytest.mark.parametrize("mlflow_status", ["FINISHED", "FAILED", "KILLED"])
@pytest.mark.parametrize("state", ENDED)
def test_an_ended_record_stands(mlflow_status: str, state: str) -> None:
    assert reconcile(mlflow_status, state) == Verdict(OF_MLFLOW[mlflow_status])


@pytest.mark.parametrize("mlflow_status", ["SCHEDULED", "RUNNING"])
@pytest.mark.parametrize("state", ENDED)
def test_an_open_record_is_mended_to_the_tasks_end(mlflow_status: str, state: str) -> None:
    mend, status = ENDED[state]
    assert reconcile(mlflow_status, state) == Verdict(status, mend)


@pytest.mark.parametrize("state", ENDED)
def test_without_a_record_there_is_nothing_to_mend(state: str) -> None:
    assert reconcile(None, state) == Verdict(ENDED[state][1])


@pytest.mark.parametrize("mlflow_status", OF_MLFLOW)
def test_a_forgotten_task_leaves_an_ended_record_and_fails_an_open_one(mlflow_status: str) -> None:
    verdict = reconcile(mlflow_status, None, has_task=False)
    if OF_MLFLOW[mlflow_status].ended:
        assert verdict == Verdict(OF_MLFLOW[mlflow_status])
    else:
        assert verdict == Verdict(JobStatus.failed, "FAILED")
