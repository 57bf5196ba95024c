"""Both sides brought to agree, between a fake Airflow and a fake MLflow."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from post_training.airflow_runs import Progress
from post_training.errors import RecordUnavailableError
from post_training.job_ids import TaskKey
from post_training.mending import SUBMIT_TIME, Mender
from post_training.record import identity_tags
from post_training.schemas.jobs import JobStatus, ReconcileJobsResponse
from post_training.tracking import JobRun
from tests.fakes import NOW, FakeRuns, FakeTracking, task

KEY = TaskKey("supervised_fine_tune", "job-1", "train")
FAILURE = "The Airflow task ended without a result; its log says more."


class Job:
    """One job, its task and its record in given states."""

    def __init__(self, state: str | None, status: str, **tags: str) -> None:
        self.runs, self.tracking = FakeRuns(), FakeTracking()
        if state != "forgotten":
            self.runs.add(task(KEY, state, {"mlflow_run_id": "run-1"}))
        self.tracking.create_run(
            name="job-1", experiment=None, tags=identity_tags(KEY) | tags, params={}, request={}
        )
        self.tracking.set_status("run-1", status)
        self.tracking.statuses.clear()
        self.mender = Mender(self.runs, lambda: self.tracking)  # type: ignore[arg-type, return-value]

    @property
    def status(self) -> str:
        return self.tracking.runs["run-1"].status

    def mended(self) -> JobStatus:
        return self.mender.mended(self.runs.find("job-1"), self.tracking.runs["run-1"]).status

    def reconcile(self) -> ReconcileJobsResponse:
        return self.mender.reconcile_all(lambda dag_id: dag_id == "supervised_fine_tune")


def test_a_record_that_its_task_has_outlived_gets_an_end_and_a_reason() -> None:
    job = Job("failed", "RUNNING")
    assert job.mended() is JobStatus.failed
    assert job.status == "FAILED"
    assert job.tracking.runs["run-1"].tags["post_training.error"] == FAILURE


def test_the_reason_of_the_last_attempt_is_kept() -> None:
    job = Job("failed", "RUNNING", **{"post_training.error": "The trainer was killed."})
    job.mended()
    assert job.tracking.runs["run-1"].tags["post_training.error"] == "The trainer was killed."


@pytest.mark.parametrize(("state", "followed"), [("failed", ""), ("success", "a")])
def test_nobody_follows_the_trainer_on_ray_of_a_job_that_has_failed(state: str, followed: str) -> None:
    job = Job(state, "RUNNING", **{"post_training.followed_attempt": "a"})
    job.mended()
    assert job.tracking.runs["run-1"].tags["post_training.followed_attempt"] == followed


def test_a_task_that_airflow_has_just_failed_may_still_be_ending() -> None:
    job = Job("failed", "RUNNING")
    job.runs.tasks["job-1"] = replace(job.runs.tasks["job-1"], ended_at=datetime.now(UTC))
    assert job.mended() is JobStatus.in_progress
    assert job.status == "RUNNING"


def test_a_task_that_was_stopped_in_airflow_is_a_cancelled_job_at_once() -> None:
    job = Job("failed", "RUNNING")
    job.runs.tasks["job-1"] = replace(job.runs.tasks["job-1"], ended_at=datetime.now(UTC))
    job.runs.stopped.append(("job-1", "somebody"))
    assert job.mended() is JobStatus.cancelled
    assert job.status == "KILLED"


def test_a_task_that_was_skipped_before_it_began_is_a_cancelled_job_at_once() -> None:
    job = Job("skipped", "SCHEDULED")
    job.runs.tasks["job-1"] = replace(job.runs.tasks["job-1"], ended_at=datetime.now(UTC))
    assert job.mended() is JobStatus.cancelled
    assert job.status == "KILLED"


def test_the_task_of_a_cancelled_job_is_stopped() -> None:
    job = Job("running", "KILLED", **{"post_training.cancelled_attempt": "attempt-1"})
    assert job.mended() is JobStatus.cancelled
    assert job.runs.tasks["job-1"].state == "failed"


def test_a_job_that_was_cancelled_before_it_began_and_cleared_is_in_progress() -> None:
    job = Job("running", "KILLED", **{"post_training.cancelled_attempt": "attempt-0"})
    assert job.mended() is JobStatus.in_progress
    assert (job.status, job.runs.tasks["job-1"].state) == ("KILLED", "running")


def test_the_cancel_of_an_attempt_before_does_not_end_this_one() -> None:
    tags = {"post_training.cancelled_attempt": "attempt-0", "post_training.attempt_id": "attempt-1"}
    assert Job("running", "KILLED", **tags).mended() is JobStatus.in_progress


def test_an_attempt_that_goes_on_opens_a_record_that_had_failed() -> None:
    job = Job("up_for_retry", "FAILED")
    assert job.mended() is JobStatus.in_progress
    assert job.status == "RUNNING"


@pytest.mark.parametrize(("age", "status"), [(0, JobStatus.scheduled), (1, JobStatus.failed)])
def test_a_run_whose_submit_may_be_under_way_is_scheduled(age: int, status: JobStatus) -> None:
    job = Job("forgotten", "SCHEDULED")
    created = datetime.now(UTC) - age * (SUBMIT_TIME + timedelta(seconds=1))
    job.tracking.runs["run-1"] = replace(job.tracking.runs["run-1"], created_at=created)
    assert job.mended() is status


def test_all_open_runs_are_mended_at_once() -> None:
    job = Job("failed", "RUNNING", **{"post_training.attempt": "1"})
    assert job.reconcile() == ReconcileJobsResponse(checked=1, mended=1)
    assert job.status == "FAILED"
    assert job.reconcile() == ReconcileJobsResponse()


def test_the_task_of_a_job_whose_cancel_was_cut_off_is_stopped_for_all() -> None:
    job = Job("running", "KILLED", **{"post_training.cancelled_attempt": "attempt-1"})
    assert job.reconcile() == ReconcileJobsResponse(checked=1, stopped=1)
    assert job.runs.tasks["job-1"].state == "failed"


def test_a_record_that_has_changed_since_it_was_read_is_not_overwritten() -> None:
    job = Job("failed", "RUNNING")
    seen = job.tracking.runs["run-1"]
    job.tracking.set_status("run-1", "FINISHED")
    job.mender.mended(job.runs.find("job-1"), seen)
    assert job.status == "FINISHED"


def test_a_record_that_was_left_for_another_since_it_was_read_keeps_its_end() -> None:
    job = Job("running", "FAILED", **{"post_training.attempt_id": "attempt-0"})
    seen = job.tracking.runs["run-1"]
    job.tracking.set_tags("run-1", {"post_training.job_uuid": "job-1 (superseded)"})
    job.mender.mended(job.runs.find("job-1"), seen)
    assert job.status == "FAILED"


def test_a_task_that_was_cleared_since_it_was_read_keeps_its_record() -> None:
    job = Job("failed", "RUNNING")
    seen = job.runs.find("job-1")
    assert seen is not None
    job.runs.add(replace(seen, state=None, attempt_id="attempt-2", ended_at=None))
    job.mender.mended(seen, job.tracking.runs["run-1"])
    assert job.status == "RUNNING"


def test_a_run_that_cannot_be_mended_holds_up_no_other() -> None:
    job = Job("running", "KILLED", **{"post_training.cancelled_attempt": "attempt-1"})
    job.tracking.runs["run-1"] = replace(job.tracking.runs["run-1"], status="RUNNING")
    job.runs.add(task(replace(KEY, run_id="job-2"), "failed", {"mlflow_run_id": "run-2"}))
    job.tracking.create_run(
        name="job-2", experiment=None, tags=identity_tags(replace(KEY, run_id="job-2")), params={}, request={}
    )
    broken = job.tracking.set_status

    def refuse_the_first(run_id: str, status: str, *, error: str | None = None) -> None:
        if run_id == "run-1":
            raise RecordUnavailableError("MLflow does not answer")
        broken(run_id, status, error=error)

    job.tracking.set_status = refuse_the_first  # type: ignore[method-assign]
    counts = job.reconcile()
    assert (counts.checked, counts.mended, counts.failed) == (2, 1, 1)
    assert job.tracking.runs["run-2"].status == "FAILED"


def test_a_task_that_cannot_be_stopped_does_not_hide_that_its_job_is_cancelled() -> None:
    job = Job("running", "KILLED", **{"post_training.cancelled_attempt": "attempt-1"})
    job.runs.cancel_error = RecordUnavailableError("Airflow cannot read the DAG")
    assert job.mended() is JobStatus.cancelled


def test_a_superseded_run_that_was_left_open_does_not_end_as_the_job_did() -> None:
    """The DAG run names it: it was made at submit."""
    job = Job("success", "RUNNING", **{"post_training.attempt": "1"})
    job.tracking.set_tags("run-1", {"post_training.job_uuid": "job-1 (superseded)"})
    long_ago = datetime.now(UTC) - SUBMIT_TIME - timedelta(seconds=1)
    job.tracking.runs["run-1"] = replace(job.tracking.runs["run-1"], created_at=long_ago)
    assert job.reconcile() == ReconcileJobsResponse(checked=1, mended=1)
    assert job.status == "FAILED"


def test_the_run_of_a_job_that_waits_is_left_alone() -> None:
    job = Job("queued", "SCHEDULED")
    assert job.reconcile() == ReconcileJobsResponse(checked=1)
    assert job.tracking.statuses == []


@pytest.mark.parametrize("kind", ["draft", "of no task", "beside the job's own"])
@pytest.mark.parametrize("young", [True, False])
def test_what_a_submit_that_was_cut_off_has_left_is_deleted_in_time(kind: str, young: bool) -> None:
    job = Job("queued" if kind == "beside the job's own" else "forgotten", "SCHEDULED")
    tags = {"post_training.method": "", "airflow.dag_id": KEY.dag_id} if kind == "draft" else {}
    run = replace(
        job.tracking.runs["run-1"],
        run_id="run-2",
        created_at=datetime.now(UTC) if young else NOW - SUBMIT_TIME,
        **({"tags": tags} if tags else {}),
    )
    job.tracking.runs = ({"run-1": job.tracking.runs["run-1"]} if job.runs.tasks else {}) | {"run-2": run}
    counts = job.reconcile()
    assert counts.discarded == (0 if young else 1)
    assert ("run-2" in job.tracking.runs) is young
    assert job.tracking.statuses == []


def test_a_job_that_the_caller_may_not_change_is_not_touched() -> None:
    job = Job("failed", "RUNNING")
    assert job.mender.reconcile_all(lambda dag_id: False) == ReconcileJobsResponse()
    assert job.status == "RUNNING"


def test_the_record_of_another_task_of_the_same_name_is_not_mended() -> None:
    """Both request DAGs have a run of this id; the other one's task has succeeded."""
    job = Job("running", "RUNNING", **{"post_training.attempt": "1"})
    other = replace(KEY, dag_id="preference_optimize")
    job.runs.find = lambda job_uuid: task(other, "success")  # type: ignore[method-assign]
    job.runs.find_task = lambda key: task(key, "running", {"mlflow_run_id": "run-1"})  # type: ignore[method-assign]
    assert job.reconcile() == ReconcileJobsResponse(checked=1)
    assert job.status == "RUNNING"


def test_the_record_of_a_run_that_was_deleted_does_not_get_the_end_of_its_successor() -> None:
    job = Job("success", "RUNNING", **{"post_training.attempt": "1"})
    job.tracking.create_run(name="job-1", experiment=None, tags=identity_tags(KEY), params={}, request={})
    job.runs.add(task(KEY, "success", {"mlflow_run_id": "run-2"}))
    assert job.reconcile() == ReconcileJobsResponse(checked=2, mended=2)
    assert (job.status, job.tracking.runs["run-2"].status) == ("FAILED", "FINISHED")


EVALUATE = TaskKey("nightly", "night-1", "evaluate")
GONE = "The DAG run was deleted from Airflow before it had ended."


class Stage:
    """The open run of a task that is no job, which has come as far as ``state`` says."""

    def __init__(self, state: str | None, *, run_state: str = "running", **tags: str) -> None:
        self.runs, self.tracking = FakeRuns(), FakeTracking()
        if state != "deleted":
            self.runs.of_tasks[EVALUATE] = Progress(state, NOW)
            self.runs.of_runs["nightly", "night-1"] = Progress(run_state, NOW)
        place = {name: value for name, value in identity_tags(EVALUATE).items() if "airflow" in name}
        tags = {"post_training.stage": "digest", **place, **tags}
        self.tracking.create_run(name="", experiment=None, tags=tags, params={}, request={})
        self.tracking.set_status("run-1", "RUNNING")
        self.mender = Mender(self.runs, lambda: self.tracking)  # type: ignore[arg-type, return-value]

    def reconcile(self) -> tuple[int, str, str | None]:
        """Mend it; return how many were, its status, and the reason."""
        counts = self.mender.reconcile_all(lambda dag_id: dag_id == "nightly")
        assert (counts.checked, counts.failed, counts.discarded) == (1, 0, 0)
        run = self.tracking.runs["run-1"]
        return counts.mended, run.status, run.tags.get("post_training.error")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("running", (0, "RUNNING", None)),
        ("up_for_retry", (0, "RUNNING", None)),
        (None, (0, "RUNNING", None)),
        ("success", (1, "FINISHED", None)),
        ("failed", (1, "FAILED", FAILURE)),
        ("deleted", (1, "FAILED", GONE)),
    ],
)
def test_the_run_of_a_task_that_is_no_job_ends_as_the_task(
    state: str | None, expected: tuple[int, str, str | None]
) -> None:
    assert Stage(state).reconcile() == expected


@pytest.mark.parametrize(
    ("run_state", "expected"),
    [
        ("running", (0, "RUNNING", None)),
        ("queued", (0, "RUNNING", None)),
        ("success", (1, "FINISHED", None)),
        ("failed", (1, "FAILED", FAILURE)),
    ],
)
def test_the_run_of_a_night_is_open_until_its_dag_run_has_ended(
    run_state: str, expected: tuple[int, str, str | None]
) -> None:
    night = {"post_training.night": "digest"}
    assert Stage("success", run_state=run_state, **night).reconcile() == expected


def test_a_night_that_was_deleted_before_it_was_summed_up_has_failed() -> None:
    assert Stage("deleted", **{"post_training.night": "digest"}).reconcile() == (1, "FAILED", GONE)


def test_the_reason_that_a_stage_has_left_is_kept() -> None:
    stage = Stage("failed", **{"post_training.error": "No memory."})
    assert stage.reconcile() == (1, "FAILED", "No memory.")


@pytest.mark.parametrize("state", ["failed", "success", "deleted"])
def test_a_trial_that_was_left_open_has_failed_however_its_worker_ended(state: str) -> None:
    trial = {"post_training.trial": "3", "post_training.trial_state": "running"}
    stage = Stage(state, **trial)
    assert stage.reconcile()[:2] == (1, "FAILED")
    state_of_trial = stage.tracking.runs["run-1"].tags["post_training.trial_state"]
    assert state_of_trial == "running", "a task that is cleared goes on with it"


def test_a_stage_that_airflow_has_just_failed_may_still_be_ending() -> None:
    stage = Stage("failed")
    stage.runs.of_tasks[EVALUATE] = Progress("failed", datetime.now(UTC))
    assert stage.reconcile() == (0, "RUNNING", None)


@pytest.mark.parametrize("change", ["cleared", "ended", "deleted"])
def test_a_stage_that_has_changed_since_it_was_read_is_left_alone(change: str) -> None:
    stage = Stage("failed")
    read = stage.tracking.get

    def get(run_id: str) -> JobRun | None:
        if change == "cleared":
            stage.runs.of_tasks[EVALUATE] = Progress(None, None)
        elif change == "ended":
            stage.tracking.set_status("run-1", "FINISHED")
        return None if change == "deleted" else read(run_id)

    stage.tracking.get = get  # type: ignore[method-assign]
    assert stage.reconcile()[0] == 0
    assert stage.tracking.runs["run-1"].status == ("FINISHED" if change == "ended" else "RUNNING")


def test_a_stage_whose_place_cannot_be_read_has_nobody_to_end_it() -> None:
    assert Stage("running", **{"airflow.map_index": "many"}).reconcile() == (1, "FAILED", GONE)
