"""The job service between a fake Airflow and a fake MLflow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from time import sleep
from typing import Any

import pytest

from post_training.errors import (
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    RecordUnavailableError,
)
from post_training.job_ids import TaskKey
from post_training.jobs import JobService
from post_training.record import identity_tags
from post_training.schemas.flat import flatten
from post_training.schemas.jobs import JobStatus
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from tests.fakes import NOW, FakeAccess, FakeRuns, FakeTracking, task
from tests.requests_of import LORA, dpo_body, sft_body

KEY = TaskKey("supervised_fine_tune", "job-1", "train")


class Accepting:
    """A resolver that finds everything, or nothing."""

    def __init__(self) -> None:
        self.error: InvalidRequestError | None = None

    def check(self, request: Any) -> None:
        if self.error is not None:
            raise self.error

    def pins(self, request: Any) -> dict[str, str]:
        return {}


@pytest.fixture
def runs() -> FakeRuns:
    return FakeRuns()


@pytest.fixture
def tracking() -> FakeTracking:
    return FakeTracking()


@pytest.fixture
def resolver() -> Accepting:
    return Accepting()


@pytest.fixture
def service(runs: FakeRuns, tracking: FakeTracking, resolver: Accepting) -> JobService:
    return JobService(runs, lambda: tracking, resolver)  # type: ignore[arg-type, return-value]


def request(**changes: Any) -> SupervisedFineTuneRequest:
    return SupervisedFineTuneRequest.model_validate(sft_body(**changes))


def submitted(runs: FakeRuns, tracking: FakeTracking, service: JobService, state: str, status: str) -> None:
    """Leave one job whose task and record are in these states."""
    service.submit(request(), FakeAccess())
    ended = NOW if state in ("success", "failed") else None
    runs.tasks["job-1"] = replace(runs.tasks["job-1"], state=state, started_at=NOW, ended_at=ended)
    tracking.set_tags("run-1", {"post_training.attempt_id": "attempt-1"})
    tracking.set_status("run-1", status)


def test_submit_makes_a_scheduled_run_and_triggers_the_dag(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    assert service.submit(request(), FakeAccess()).job_uuid == "job-1"
    run = tracking.runs["run-1"]
    assert run.status == "SCHEDULED"
    assert run.tags["post_training.job_uuid"] == "job-1"
    assert run.tags["airflow.dag_id"] == "supervised_fine_tune"
    assert run.tags["airflow.run_id"] == "job-1"
    assert runs.tasks["job-1"].conf == {**flatten(request()), "mlflow_run_id": "run-1"}


def test_a_preference_job_is_submitted_to_its_own_dag(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    body = dpo_body(runtime={"adapter": LORA})
    wanted = PreferenceOptimizeRequest.model_validate(body)
    assert service.submit(wanted, FakeAccess()).job_uuid == "job-1"
    assert runs.tasks["job-1"].key == TaskKey("preference_optimize", "job-1", "train")
    assert runs.tasks["job-1"].conf == {**flatten(wanted), "mlflow_run_id": "run-1"}
    assert tracking.runs["run-1"].tags["post_training.method"] == "preference_optimize"
    assert service.submit(wanted, FakeAccess()).job_uuid == "job-1"
    assert runs.triggered == ["job-1"]


@pytest.mark.parametrize("method", ["supervised_fine_tune", "preference_optimize"])
def test_a_job_with_a_search_is_submitted_to_the_dag_that_searches(
    service: JobService, runs: FakeRuns, tracking: FakeTracking, method: str
) -> None:
    body, model = {
        "supervised_fine_tune": (sft_body(), SupervisedFineTuneRequest),
        "preference_optimize": (dpo_body(), PreferenceOptimizeRequest),
    }[method]
    space = {"training_config.n_epochs": {"type": "int", "low": 1, "high": 3}}
    wanted = model.model_validate({**body, "hyperparam_search_config": {"space": space, "n_trials": 2}})
    assert service.submit(wanted, FakeAccess()).job_uuid == "job-1"
    assert service.submit(wanted, FakeAccess()).job_uuid == "job-1"
    assert runs.triggered == ["job-1"]
    assert runs.tasks["job-1"].key == TaskKey(f"{method}_search", "job-1", "train")
    assert tracking.runs["run-1"].tags["airflow.dag_id"] == f"{method}_search"
    with pytest.raises(JobConflictError):
        service.submit(model.model_validate(body), FakeAccess())


def test_while_its_trials_run_a_job_is_in_progress_and_can_be_cancelled(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    space = {"training_config.n_epochs": {"type": "int", "low": 1, "high": 3}}
    service.submit(request(hyperparam_search_config={"space": space, "n_trials": 2}), FakeAccess())
    assert service.status("job-1", FakeAccess()).status is JobStatus.scheduled
    tracking.set_status("run-1", "RUNNING")  # as the search's plan does; the job's own task waits
    assert service.status("job-1", FakeAccess()).status is JobStatus.in_progress
    service.cancel("job-1", FakeAccess())
    runs.tasks["job-1"] = replace(runs.tasks["job-1"], state="skipped")  # as Airflow leaves it
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled
    assert tracking.runs["run-1"].status == "KILLED"


def test_the_same_again_answers_the_same_and_makes_nothing(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    first = service.submit(request(), FakeAccess())
    assert service.submit(request(), FakeAccess()) == first
    assert len(tracking.runs) == len(runs.triggered) == 1


def test_another_payload_under_the_same_id_conflicts(service: JobService) -> None:
    service.submit(request(), FakeAccess())
    with pytest.raises(JobConflictError, match="'job-1' belongs to a job with another request"):
        service.submit(request(training_config__n_epochs=2), FakeAccess())
    with pytest.raises(JobConflictError):
        service.submit(PreferenceOptimizeRequest.model_validate(dpo_body()), FakeAccess())


def test_losing_the_race_to_the_same_request_is_no_error(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    runs.appears_during_trigger = task(KEY, None, {**flatten(request()), "mlflow_run_id": "theirs"})
    assert service.submit(request(), FakeAccess()).job_uuid == "job-1"
    assert tracking.runs == {}


@pytest.mark.parametrize("error", [RecordUnavailableError("busy"), ValueError("broken")])
def test_a_failed_trigger_leaves_no_run(
    service: JobService, runs: FakeRuns, tracking: FakeTracking, error: Exception
) -> None:
    runs.trigger_error = error
    with pytest.raises(type(error)):
        service.submit(request(), FakeAccess())
    assert tracking.runs == {}


def test_without_mlflow_nothing_is_triggered(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    tracking.down = True
    with pytest.raises(RecordUnavailableError):
        service.submit(request(), FakeAccess())
    assert runs.triggered == []


def test_what_the_deployments_defaults_make_a_job_is_submitted(
    runs: FakeRuns, tracking: FakeTracking, resolver: Accepting
) -> None:
    defaults: dict[str, Any] = {"launcher": "ray"}
    service = JobService(runs, lambda: tracking, resolver, lambda: defaults)  # type: ignore[arg-type, return-value]
    wanted = request(runtime={"num_nodes": 2})
    service.submit(wanted, FakeAccess())
    assert runs.tasks["job-1"].conf == {**flatten(wanted), "mlflow_run_id": "run-1"}, "as it was asked for"
    defaults.clear()
    with pytest.raises(InvalidRequestError, match=r"runtime\.num_nodes: must be 1 with .*launcher local"):
        service.submit(request(job_uuid="job-2", runtime={"num_nodes": 2}), FakeAccess())


def test_a_request_that_cannot_be_trained_makes_nothing(
    service: JobService, runs: FakeRuns, tracking: FakeTracking, resolver: Accepting
) -> None:
    flags = {"fsdp_cpu_offload": True}
    with pytest.raises(InvalidRequestError, match=r"efficiency_config\.fsdp_cpu_offload: must be false"):
        service.submit(request(training_config__efficiency_config=flags), FakeAccess())
    resolver.error = InvalidRequestError.of("model", "no such file")
    with pytest.raises(InvalidRequestError, match="model: no such file"):
        service.submit(request(), FakeAccess())
    assert (tracking.runs, runs.triggered) == ({}, [])


def test_submit_needs_the_right_to_trigger(service: JobService, tracking: FakeTracking) -> None:
    with pytest.raises(ForbiddenError, match="somebody may not start runs of the DAG 'supervised_fine_tune'"):
        service.submit(request(), FakeAccess(trigger=False))
    assert tracking.runs == {}


def test_list_is_newest_first_and_only_what_may_be_read(service: JobService) -> None:
    for name in ("a", "b"):
        service.submit(request(job_uuid=name), FakeAccess())
    assert [job.job_uuid for job in service.list(FakeAccess()).data] == ["b", "a"]
    assert service.list(FakeAccess(read=False)).data == []


def test_status_speaks_of_task_and_record(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    service.submit(request(), FakeAccess())
    assert service.status("job-1", FakeAccess()).status is JobStatus.scheduled
    runs.tasks["job-1"] = replace(runs.tasks["job-1"], state="running", started_at=NOW)
    tracking.set_status("run-1", "RUNNING")
    status = service.status("job-1", FakeAccess())
    assert (status.status, status.scheduled_at, status.started_at) == (JobStatus.in_progress, NOW, NOW)
    assert (status.completed_at, status.error) == (None, None)


def test_an_id_that_a_task_of_another_dag_may_have_is_refused(service: JobService, runs: FakeRuns) -> None:
    runs.add(task(TaskKey("nightly", "r", "sft"), None))
    with pytest.raises(InvalidRequestError, match="job_uuid: must not start with 'nightly' and a dot"):
        service.submit(request(job_uuid="nightly.tomorrow.sft"), FakeAccess())


def test_status_gives_the_recorded_reason_and_resources(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "failed", "RUNNING")
    tracking.set_status("run-1", "FAILED", error="Row 3 is bad.")
    run = tracking.runs["run-1"]
    tracking.runs["run-1"] = replace(run, tags={**run.tags, "post_training.resources": '{"device": "cpu"}'})
    status = service.status("job-1", FakeAccess())
    assert (status.error, status.resources_allocated) == ("Row 3 is bad.", {"device": "cpu"})


def test_a_job_that_airflow_has_forgotten_is_found_by_its_record(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "success", "FINISHED")
    runs.tasks.clear()
    assert service.status("job-1", FakeAccess()).status is JobStatus.completed
    with pytest.raises(JobConflictError):
        service.cancel("job-1", FakeAccess())


@pytest.mark.parametrize("method", ["status", "artifacts", "cancel", "locate"])
def test_a_job_that_is_not_there_or_not_visible_is_not_found(service: JobService, method: str) -> None:
    with pytest.raises(JobNotFoundError, match="no post-training job 'nothing'"):
        getattr(service, method)("nothing", FakeAccess())
    service.submit(request(), FakeAccess())
    with pytest.raises(JobNotFoundError):
        getattr(service, method)("job-1", FakeAccess(read=False))


def test_cancel_stops_the_task_and_kills_the_record(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "running", "RUNNING")
    service.cancel("job-1", FakeAccess())
    assert runs.tasks["job-1"].state == "failed"
    assert tracking.runs["run-1"].status == "KILLED"
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled


def test_a_cancel_that_stopped_half_way_is_finished_by_the_next_read(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "running", "RUNNING")
    runs.cancel_error = RecordUnavailableError("Airflow's database is busy")
    with pytest.raises(RecordUnavailableError):
        service.cancel("job-1", FakeAccess())
    assert (runs.tasks["job-1"].state, tracking.runs["run-1"].status) == ("running", "KILLED")
    runs.cancel_error = None
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled
    assert runs.tasks["job-1"].state == "failed"


def test_a_cancel_that_stopped_half_way_may_be_asked_for_again(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "running", "RUNNING")
    tracking.set_tags("run-1", {"post_training.cancelled_attempt": "attempt-1"})
    service.cancel("job-1", FakeAccess())
    assert (runs.tasks["job-1"].state, tracking.runs["run-1"].status) == ("failed", "KILLED")


def test_without_mlflow_a_job_is_cancelled_in_airflow(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "running", "RUNNING")
    tracking.down = True
    with pytest.raises(ForbiddenError):
        service.cancel("job-1", FakeAccess(cancel=False))
    with pytest.raises(RecordUnavailableError):
        service.cancel("job-1", FakeAccess(read=False))
    service.cancel("job-1", FakeAccess())
    assert runs.tasks["job-1"].state == "failed"
    tracking.down = False
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled
    assert tracking.runs["run-1"].status == "KILLED"


def test_a_job_that_is_completed_in_the_very_moment_of_its_cancel_is_cancelled_for_all(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "running", "RUNNING")
    write = tracking.set_tags

    def finish_first(run_id: str, tags: Any) -> None:
        if tracking.runs[run_id].status == "RUNNING":
            tracking.set_status(run_id, "FINISHED")
        write(run_id, tags)

    tracking.set_tags = finish_first  # type: ignore[method-assign]
    runs.cancel_error = JobConflictError("its task has ended")
    service.cancel("job-1", FakeAccess())
    runs.tasks["job-1"] = replace(runs.tasks["job-1"], state="success")
    assert tracking.runs["run-1"].status == "KILLED"
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled


def test_a_job_that_finishes_cannot_be_cancelled_any_more(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    """Its record says so already; its task is about to."""
    submitted(runs, tracking, service, "running", "FINISHED")
    tracking.set_tags("run-1", {"post_training.max_tries": "5"})
    with pytest.raises(JobConflictError, match="has ended: completed"):
        service.cancel("job-1", FakeAccess())
    assert (runs.tasks["job-1"].state, tracking.runs["run-1"].status) == ("running", "FINISHED")


def test_a_completed_job_that_is_cleared_and_cancelled_keeps_what_was_completed(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    submitted(runs, tracking, service, "queued", "FINISHED")
    before = {"post_training.max_tries": "5", "post_training.attempt_id": "attempt-0"}
    tracking.set_tags("run-1", before)
    runs.cancel_error = RecordUnavailableError("Airflow's database is busy")
    with pytest.raises(RecordUnavailableError):
        service.cancel("job-1", FakeAccess())
    runs.cancel_error = None
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled
    assert (runs.tasks["job-1"].state, tracking.runs["run-1"].status) == ("failed", "FINISHED")
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled


def test_a_job_without_a_record_is_cancelled_too(service: JobService, runs: FakeRuns) -> None:
    """It came from the form and waits: its task makes the run when it begins."""
    runs.add(task(KEY, "queued"))
    service.cancel("job-1", FakeAccess())
    assert service.status("job-1", FakeAccess()).status is JobStatus.cancelled


def test_identical_submits_at_once_make_one_run(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    made, together = tracking.create_run, Barrier(8)

    def slowly(**arguments: Any) -> Any:
        sleep(0.05)
        return made(**arguments)

    def submit(_: int) -> Any:
        together.wait(30)
        return service.submit(request(), FakeAccess())

    tracking.create_run = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(submit, range(16)))
    assert {answer.job_uuid for answer in answers} == {"job-1"}
    assert (list(tracking.runs), runs.triggered) == (["run-1"], ["job-1"])


@pytest.mark.parametrize(
    ("state", "status"), [("success", "FINISHED"), ("failed", "FAILED"), ("failed", "KILLED")]
)
def test_an_ended_job_cannot_be_cancelled(
    service: JobService, runs: FakeRuns, tracking: FakeTracking, state: str, status: str
) -> None:
    submitted(runs, tracking, service, state, status)
    with pytest.raises(JobConflictError, match="has ended"):
        service.cancel("job-1", FakeAccess())
    assert tracking.runs["run-1"].status == status


def test_cancel_needs_the_right_to_change_the_run(service: JobService, runs: FakeRuns) -> None:
    service.submit(request(), FakeAccess())
    with pytest.raises(ForbiddenError):
        service.cancel("job-1", FakeAccess(cancel=False))
    assert runs.tasks["job-1"].state is None


def test_a_forged_run_id_in_the_conf_is_not_followed(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    service.submit(request(job_uuid="other"), FakeAccess())
    runs.add(task(KEY, "running", {"mlflow_run_id": "run-1"}))
    assert service.status("job-1", FakeAccess()).checkpoints == []
    assert service.artifacts("job-1", FakeAccess()).job_uuid == "job-1"


def test_what_a_submit_has_left_half_made_is_no_job(service: JobService, tracking: FakeTracking) -> None:
    service.submit(request(), FakeAccess())
    tracking.create_run(
        name="", experiment=None, tags=identity_tags(replace(KEY, run_id="cut-off")), params={}, request={}
    )
    with pytest.raises(JobNotFoundError):
        service.status("cut-off", FakeAccess())
    with pytest.raises(JobNotFoundError):
        service.cancel("cut-off", FakeAccess())
    assert list(tracking.runs) == ["run-1", "run-2"]


@pytest.mark.parametrize("status", ["FINISHED", "KILLED"])
def test_a_status_that_somebody_wrote_by_hand_does_not_end_a_job_that_trains(
    service: JobService, runs: FakeRuns, tracking: FakeTracking, status: str
) -> None:
    submitted(runs, tracking, service, "running", status)
    assert service.status("job-1", FakeAccess()).status is JobStatus.in_progress
    runs.tasks["job-1"] = replace(runs.tasks["job-1"], state="failed", ended_at=NOW)
    ended = {"FINISHED": JobStatus.failed, "KILLED": JobStatus.cancelled}
    assert service.status("job-1", FakeAccess()).status is ended[status]


def test_submit_says_the_same_of_every_id_of_a_dag_that_may_not_be_read(
    service: JobService, runs: FakeRuns, tracking: FakeTracking
) -> None:
    runs.add(task(TaskKey("secret", "run", "train"), "running"))
    said = set()
    for job_uuid in ("secret.run.train", "secret.no.such"):
        with pytest.raises(InvalidRequestError) as caught:
            service.submit(request(job_uuid=job_uuid), FakeAccess(read=False))
        said.add(str(caught.value))
    assert said == {"job_uuid: is not available: choose another"}
    assert tracking.runs == {}
