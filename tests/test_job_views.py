"""What the page shows, over fakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from post_training.errors import JobNotFoundError, RecordUnavailableError
from post_training.job_ids import TaskKey, job_uuid_of
from post_training.job_views import CHARTED, JobViews, algorithm_of
from post_training.jobs import JobService
from post_training.schemas.jobs import JobStatus
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.views import JobRow
from tests.fakes import FakeAccess, FakeReader, FakeRuns, FakeTracking, task
from tests.requests_of import sft_body
from tests.test_jobs import Accepting

ALL = FakeAccess()
NIGHTLY = TaskKey("nightly", "night.1", "sft")


class Shown:
    """The views over fakes, and jobs in several states."""

    def __init__(self) -> None:
        self.runs, self.tracking = FakeRuns(), FakeTracking()
        self.service = JobService(self.runs, lambda: self.tracking, Accepting())  # type: ignore[arg-type, return-value]
        self.views = JobViews(self.runs, lambda: self.tracking, self.service, FakeReader)  # type: ignore[arg-type, return-value]

    def submit(self, job_uuid: str, state: str | None = None, **metrics: float) -> str:
        """Submit a job, bring its task to a state, and return its run's id."""
        self.service.submit(SupervisedFineTuneRequest.model_validate(sft_body(job_uuid=job_uuid)), ALL)
        self.runs.add(replace(self.runs.tasks[job_uuid], state=state, attempt=1, attempt_id="attempt-1"))
        run_id = f"run-{self.tracking.created}"
        run = self.tracking.runs[run_id]
        tags = {**run.tags, "post_training.attempt_id": "attempt-1"}
        statuses = {"success": "FINISHED", "failed": "FAILED", "running": "RUNNING", None: "SCHEDULED"}
        self.tracking.runs[run_id] = replace(run, tags=tags, status=statuses[state], metrics=metrics)
        return run_id

    def row(self, job_uuid: str) -> JobRow:
        return next(row for row in self.views.page(ALL).jobs if row.job_uuid == job_uuid)


@pytest.fixture
def shown() -> Shown:
    return Shown()


def test_a_row_says_what_airflow_and_mlflow_know(shown: Shown) -> None:
    run_id = shown.submit("job-1", "running", train_loss=1.5, progress=0.25, seconds_left=60.0)
    shown.tracking.curves[run_id, "train_loss"] = ([1, 2], [2.0, 1.5])
    row = shown.row("job-1")
    assert (row.status, row.method, row.algorithm, row.model) == (
        JobStatus.in_progress,
        "supervised_fine_tune",
        "LoRA",
        "org/model",
    )
    assert (row.progress, row.seconds_left, row.train_loss, row.sparkline) == (0.25, 60.0, 1.5, [2.0, 1.5])


def test_a_page_costs_two_calls_to_mlflow_however_many_jobs_it_has(shown: Shown) -> None:
    for number in range(60):
        shown.submit(f"job-{number}", "success", train_loss=1.0)
    page = shown.views.page(ALL, offset=10, limit=50)
    assert (len(page.jobs), page.total) == (50, 60)
    assert page.jobs[0].job_uuid == "job-49"
    assert shown.tracking.calls == ["by_id", "curves train_loss"]


def test_a_stage_of_another_dag_is_found_by_one_call_for_its_dag(shown: Shown) -> None:
    tags = {
        "post_training.method": "preference_optimize",
        "airflow.dag_id": "nightly",
        "airflow.run_id": "night.1",
        "airflow.task_id": "sft",
        "airflow.map_index": "-1",
    }
    shown.tracking.create_run(name="", experiment=None, tags=tags, params={"model": "m"}, request={})
    shown.runs.add(task(NIGHTLY, "running"))
    row = shown.row("nightly.night.1.sft")
    assert (row.method, row.algorithm, row.model) == ("preference_optimize", "DPO", "m")
    assert shown.tracking.calls == ["by_id", "of_dag nightly"]


def test_a_job_older_than_the_newest_hundred_of_its_dag_is_found(shown: Shown) -> None:
    for number in range(101):
        key = TaskKey("nightly", f"night.{number}", "sft")
        tags = {
            "post_training.job_uuid": job_uuid_of(key),
            "post_training.method": "supervised_fine_tune",
            "airflow.dag_id": key.dag_id,
            "airflow.run_id": key.run_id,
            "airflow.task_id": key.task_id,
            "airflow.map_index": "-1",
        }
        shown.tracking.create_run(name="", experiment=None, tags=tags, params={"model": "m"}, request={})
    for number in (0, 100):
        shown.runs.add(task(TaskKey("nightly", f"night.{number}", "sft"), "failed"))
    assert [row.model for row in shown.views.page(ALL).jobs] == ["m", "m"]


def test_without_mlflow_the_list_says_what_airflow_knows_and_what_is_missing(shown: Shown) -> None:
    shown.submit("job-1", "running", train_loss=1.5)
    shown.tracking.down = True
    page = shown.views.page(ALL)
    assert page.notice is not None
    assert "MLflow does not answer" in page.notice
    (row,) = page.jobs
    assert (row.status, row.algorithm, row.model, row.train_loss) == (
        JobStatus.in_progress,
        "LoRA",
        "org/model",
        None,
    )


def test_without_mlflow_a_job_says_what_airflow_knows_and_can_be_cancelled(shown: Shown) -> None:
    shown.submit("job-1", "running", train_loss=1.5)
    shown.submit("job-2", "failed")
    shown.tracking.down = True
    job = shown.views.job("job-1", ALL)
    assert (job.status, job.model, job.params["model"]) == (JobStatus.in_progress, "org/model", "org/model")
    assert (job.may_cancel, job.may_retry, job.may_clone, job.may_read_logs) == (True, False, True, True)
    assert (job.mlflow_url, job.checkpoints, job.metrics) == (None, [], {})
    assert shown.views.job("job-2", ALL).may_retry
    for unknown, access in (("job-3", ALL), ("job-1", FakeAccess(read=False))):
        with pytest.raises(RecordUnavailableError):
            shown.views.job(unknown, access)


def test_a_row_says_nothing_of_a_request_that_nobody_knows(shown: Shown) -> None:
    shown.runs.add(task(TaskKey("supervised_fine_tune", "job-1", "train"), "running"))
    row = shown.row("job-1")
    assert (row.method, row.algorithm, row.model) == ("supervised_fine_tune", None, None)


def test_without_airflow_there_is_no_list(shown: Shown) -> None:
    shown.runs.down = True
    with pytest.raises(RecordUnavailableError):
        shown.views.page(ALL)


def test_the_filter_is_of_the_dags_that_the_caller_may_read(shown: Shown) -> None:
    shown.submit("job-1", "running")
    shown.views.page(ALL, status=JobStatus.failed, text="x", dag_id="supervised_fine_tune", run_id="r")
    asked = shown.runs.asked_for
    assert asked is not None
    assert (set(asked.dag_ids), asked.status, asked.text, asked.run_id) == (
        {"supervised_fine_tune"},
        JobStatus.failed,
        "x",
        "r",
    )
    nobody = shown.views.page(FakeAccess(read=False, trigger=False))
    assert (nobody.jobs, nobody.total, nobody.may_submit) == ([], 0, False)


@pytest.mark.parametrize(
    ("state", "cancel", "retry"),
    [(None, True, False), ("running", True, False), ("success", False, False), ("failed", False, True)],
)
def test_buttons_are_offered_where_they_would_work(
    shown: Shown, state: str | None, cancel: bool, retry: bool
) -> None:
    shown.submit("job-1", state)
    view = shown.views.job("job-1", ALL)
    assert (view.may_cancel, view.may_retry, view.may_clone) == (cancel, retry, True)
    viewer = shown.views.job("job-1", FakeAccess(trigger=False, cancel=False))
    assert (viewer.may_cancel, viewer.may_retry, viewer.may_clone) == (False, False, False)


@pytest.mark.parametrize(
    ("map_index", "searched", "retried"),
    [
        (-1, False, ["train"]),
        (3, False, [("train", 3)]),
        (-1, True, ["plan", "trials", "train"]),
    ],
)
def test_a_retry_clears_the_job_and_its_search(
    shown: Shown, map_index: int, searched: bool, retried: list[Any]
) -> None:
    shown.submit("job-1", "failed")
    task = shown.runs.tasks["job-1"]
    place = replace(task.key, map_index=map_index)
    changed = replace(task, key=place, searched=searched, blocked=True)
    shown.runs.add(changed)
    view = shown.views.job(changed.job_uuid, ALL)
    assert (view.retried, view.blocked) == (retried, True)


def test_a_job_whose_log_the_caller_may_not_read(shown: Shown) -> None:
    shown.submit("job-1", "running")
    assert shown.views.job("job-1", ALL).may_read_logs
    assert not shown.views.job("job-1", FakeAccess(logs=False)).may_read_logs


def test_a_job_shows_its_request_and_where_mlflow_has_it(shown: Shown) -> None:
    shown.submit("job-1", "running", train_loss=1.0)
    view = shown.views.job("job-1", ALL)
    assert view.params["algorithm_config.rank"] == "4"
    assert view.mlflow_url == "http://mlflow/#/experiments/1/runs/run-1"
    assert view.metrics == {"train_loss": 1.0}


def test_nobody_sees_a_job_that_is_none_or_not_theirs(shown: Shown) -> None:
    shown.submit("job-1", "running")
    stranger = FakeAccess(read=False)
    for look in (
        lambda: shown.views.job("nothing", ALL),
        lambda: shown.views.job("job-1", stranger),
        lambda: shown.views.curves(["job-1"], stranger),
        lambda: shown.views.request("job-1", stranger),
    ):
        with pytest.raises(JobNotFoundError):
            look()


def test_curves_of_several_jobs_cost_one_call_for_each_metric(shown: Shown) -> None:
    first = shown.submit("job-1", "success", train_loss=1.0, perplexity=2.0, epoch=1.0)
    shown.submit("job-2", "running", train_loss=3.0)
    shown.submit("job-3", None)
    shown.tracking.curves[first, "train_loss"] = ([1, 2], [3.0, 1.0])
    shown.tracking.calls.clear()
    curves = shown.views.curves(["job-2", "job-1", "job-3"], ALL)
    assert [job.job_uuid for job in curves.jobs] == ["job-2", "job-1", "job-3"]
    assert [job.metrics for job in curves.jobs] == [{}, {"train_loss": ([1, 2], [3.0, 1.0])}, {}]
    assert shown.tracking.calls == ["curves train_loss", "curves perplexity"]
    assert len(set(CHARTED)) == len(CHARTED)


def test_a_jobs_request_is_its_conf_or_what_mlflow_holds(shown: Shown) -> None:
    shown.submit("job-1", "success")
    method, request = shown.views.request("job-1", ALL)
    assert (method, request["algorithm_config.rank"]) == ("supervised_fine_tune", 4)
    assert "mlflow_run_id" not in request


@pytest.mark.parametrize(
    ("method", "params", "name"),
    [
        ("supervised_fine_tune", {}, "full fine-tuning"),
        ("supervised_fine_tune", {"algorithm_config.type": "LoRA"}, "LoRA"),
        (
            "supervised_fine_tune",
            {"algorithm_config.type": "LoRA", "algorithm_config.use_dora": "True"},
            "DoRA",
        ),
        (
            "supervised_fine_tune",
            {"algorithm_config.type": "LoRA", "algorithm_config.quantize_base": True},
            "QLoRA",
        ),
        ("supervised_fine_tune", {"algorithm_config.type": "QAT"}, "QAT"),
        ("preference_optimize", {"algorithm_config.loss_type": "ipo"}, "DPO · ipo"),
        (
            "preference_optimize",
            {"algorithm_config.loss_type": "sigmoid", "runtime.adapter.type": "LoRA"},
            "DPO · LoRA",
        ),
        (None, {}, None),
    ],
)
def test_an_algorithm_has_the_fields_own_name(
    method: str | None, params: dict[str, Any], name: str | None
) -> None:
    assert algorithm_of(method, params) == name
