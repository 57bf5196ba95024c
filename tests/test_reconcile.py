"""The whole table of what a job is when MLflow and Airflow disagree."""

from __future__ import annotations

from itertools import product

import pytest
from airflow.utils.state import DagRunState, TaskInstanceState

from post_training.reconcile import OF_MLFLOW, Evidence, Verdict, reconcile, stage_status
from post_training.schemas.jobs import JobStatus

WAITING = (None, "scheduled", "queued")
WORKING = ("running", "deferred", "awaiting_input")
BETWEEN_TRIES = ("up_for_retry", "up_for_reschedule", "restarting")
ENDED = {
    "success": "completed",
    "failed": "failed",
    "upstream_failed": "failed",
    "skipped": "cancelled",
    "removed": "cancelled",
}
KINDS = {
    **dict.fromkeys(WAITING, "waits"),
    **dict.fromkeys(WORKING, "works"),
    **dict.fromkeys(BETWEEN_TRIES, "between"),
    **dict.fromkeys(ENDED, "ended"),
}

# Of each kind of task, for no record, SCHEDULED, RUNNING, FINISHED, FAILED, KILLED: the job's state, and
# behind it "!" where the record is mended to it. "=" is as recorded, "end" is as the task ended.
RECORDS = (None, *OF_MLFLOW)
TABLE = {
    # task, written by the newest attempt, cancelled
    ("waits", True, False): "scheduled scheduled in_progress scheduled scheduled scheduled",
    ("waits", False, False): "scheduled scheduled in_progress scheduled scheduled scheduled",
    ("waits", True, True): "cancelled cancelled! cancelled! cancelled cancelled cancelled",
    ("waits", False, True): "cancelled cancelled! cancelled! cancelled cancelled cancelled",
    ("works", True, False): "in_progress in_progress in_progress = = =",
    ("works", False, False): "in_progress in_progress in_progress in_progress in_progress! in_progress",
    ("works", True, True): "cancelled cancelled! cancelled! completed cancelled cancelled",
    ("works", False, True): "cancelled cancelled! cancelled! cancelled cancelled cancelled",
    ("between", True, False): "in_progress in_progress in_progress in_progress in_progress! in_progress",
    ("between", False, False): "in_progress in_progress in_progress in_progress in_progress! in_progress",
    ("between", True, True): "cancelled cancelled! cancelled! cancelled cancelled cancelled",
    ("between", False, True): "cancelled cancelled! cancelled! cancelled cancelled cancelled",
    ("ended", True, False): "end end! end! = = =",
    ("ended", False, False): "end end! end! = = =",
    ("ended", True, True): "cancelled cancelled! cancelled! = = =",
    ("ended", False, True): "cancelled cancelled! cancelled! cancelled cancelled cancelled",
}
FORGOTTEN = "failed failed! failed! = = ="
NAMES = {status.value: name for name, status in OF_MLFLOW.items()}


def expected(entry: str, record: str | None, state: str | None) -> tuple[JobStatus, str | None]:
    """Read an entry of the table: the status and the mend."""
    word = entry.rstrip("!")
    if word == "end":
        word = ENDED[str(state)]
    status = OF_MLFLOW[str(record)] if word == "=" else JobStatus(word)
    return status, NAMES[status.value] if entry.endswith("!") else None


def test_every_task_state_of_airflow_is_in_the_table() -> None:
    assert {str(state) for state in TaskInstanceState} == KINDS.keys() - {None}


@pytest.mark.parametrize(
    ("state", "same_attempt", "cancelled"), list(product(KINDS, (True, False), (False, True)))
)
def test_the_table(state: str | None, same_attempt: bool, cancelled: bool) -> None:
    row = TABLE[KINDS[state], same_attempt, cancelled].split()
    for record, entry in zip(RECORDS, row, strict=True):
        evidence = Evidence(record, state, same_attempt=same_attempt, cancelled=cancelled)
        verdict = reconcile(evidence)
        assert (verdict.status, verdict.mend) == expected(entry, record, state), evidence


@pytest.mark.parametrize(("record", "entry"), list(zip(RECORDS, FORGOTTEN.split(), strict=True)))
def test_a_forgotten_task(record: str | None, entry: str) -> None:
    verdict = reconcile(Evidence(record, None, has_task=False))
    assert (verdict.status, verdict.mend, verdict.stop) == (*expected(entry, record, None), False)


@pytest.mark.parametrize(
    ("record", "state", "same_attempt", "cancelled"),
    list(product(RECORDS, KINDS, (True, False), (True, False))),
)
def test_a_task_is_stopped_where_its_job_is_cancelled_and_it_lives(
    record: str | None, state: str | None, same_attempt: bool, cancelled: bool
) -> None:
    verdict = reconcile(Evidence(record, state, same_attempt=same_attempt, cancelled=cancelled))
    about_to_end = record == "FINISHED" and same_attempt
    assert verdict.stop is (cancelled and KINDS[state] != "ended" and not about_to_end)


@pytest.mark.parametrize(
    ("record", "state", "same_attempt", "cancelled"),
    list(product(("FINISHED", "KILLED"), KINDS, (True, False), (True, False))),
)
def test_a_finished_or_killed_record_is_never_overwritten(
    record: str, state: str | None, same_attempt: bool, cancelled: bool
) -> None:
    evidence = Evidence(record, state, same_attempt=same_attempt, cancelled=cancelled)
    assert reconcile(evidence).mend is None


def test_mending_settles_it() -> None:
    """What is mended is not mended again, and the job's state stays."""
    for record, state, cancelled in product(RECORDS, KINDS, (True, False)):
        evidence = Evidence(record, state, cancelled=cancelled)
        first = reconcile(evidence)
        if first.mend is not None:
            again = reconcile(Evidence(first.mend, state, cancelled=cancelled))
            assert again == Verdict(first.status, None, first.stop), evidence


@pytest.mark.parametrize("state", [None, *map(str, TaskInstanceState), *map(str, DagRunState)])
def test_the_run_of_a_task_that_is_no_job_ends_with_what_it_is_of(state: str | None) -> None:
    ends = dict.fromkeys(("success", "skipped"), "FINISHED")
    ends |= dict.fromkeys(("failed", "upstream_failed", "removed"), "FAILED")
    assert stage_status(state, is_there=True) == ends.get(str(state))


def test_what_is_gone_has_failed() -> None:
    assert stage_status(None, is_there=False) == "FAILED"
