"""The training operators whose trainer is a job of a Ray cluster: the Jobs API is a server of the test's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.comms import GetTaskStates, TaskStatesResult
from airflow.triggers.base import TriggerEvent

from post_training.operators.triggers import RayJobTrigger
from post_training.schemas.trainer import RESULT_LINE
from post_training.standalone_layout import free_ports
from tests.operators.conftest import connect
from tests.operators.workplace import KEY, Workplace, attempt_id
from tests.ray_api import TOKEN, RayApi

ON_RAY = {"launcher": "ray", "num_nodes": 2}
FOLLOWED = "post_training.followed_attempt"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayApi]:
    """The deployment's cluster."""
    server = RayApi()
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_ADDRESS", server.address)
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_TOKEN", TOKEN)
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_PATIENCE", "1")
    yield server
    server.close()


def job_of(attempt: int) -> str:
    return f"post-training-run-1-{attempt_id(attempt)}"


def defer(workplace: Workplace, attempt: int = 1, **context: Any) -> RayJobTrigger:
    """Let an attempt run until it leaves its worker; return what it waits for."""
    with pytest.raises(TaskDeferred) as deferred:
        workplace.operator(runtime=ON_RAY).execute(workplace.context(attempt=attempt, **context))
    assert deferred.value.method_name == "execute_complete"
    assert isinstance(deferred.value.trigger, RayJobTrigger)
    return deferred.value.trigger


def end(ray: RayApi, attempt: int, result: dict[str, Any] | None, message: str = "") -> None:
    """Let an attempt's job end, without a result if it has none."""
    job = ray.jobs[job_of(attempt)]
    completed = result is not None and result["status"] == "completed"
    job.status, job.message, job.log = "SUCCEEDED" if completed else "FAILED", message, "loss 1.5\n"
    if result is not None:
        job.log += f"\n{RESULT_LINE}{json.dumps({'attempt_id': attempt_id(attempt), **result})}\n"


def go_on(
    workplace: Workplace, attempt: int = 1, event: dict[str, Any] | None = None, **context: Any
) -> dict[str, Any]:
    """Let an attempt go on after its trigger."""
    operator = workplace.operator(runtime=ON_RAY)
    event = event or {"status": None, "error": None}
    return operator.execute_complete(workplace.context(attempt=attempt, **context), event)


def test_a_job_is_submitted_waited_for_and_recorded(workplace: Workplace, ray: RayApi) -> None:
    trigger = defer(workplace)
    assert trigger.submission_id == job_of(1)
    spec = ray.spec_of(job_of(1))
    assert (spec["attempt_id"], spec["request"]["runtime"]["num_nodes"]) == (attempt_id(1), 2)
    assert (spec["request"]["runtime"]["seed"], spec["node_patience"]) == (7, 1)
    run = workplace.tracking.runs["run-1"]
    assert (run.status, run.tags[FOLLOWED]) == ("RUNNING", attempt_id(1))
    assert "post_training.error" not in run.tags
    end(ray, 1, {"status": "completed", "metrics": {"train_loss": 1.5}})
    assert go_on(workplace)["metrics"] == {"train_loss": 1.5}
    assert workplace.tracking.runs["run-1"].status == "FINISHED"
    assert workplace.tracking.files == {"logs/train-1.log": "loss 1.5\n"}
    assert list(ray.jobs) == [job_of(1)]
    assert not workplace.work_dir.exists()


COMPLETED = {"status": "completed"}


def test_an_attempt_that_is_begun_again_waits_for_the_same_job(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace)
    assert defer(workplace).submission_id == job_of(1)
    assert list(ray.jobs) == [job_of(1)]


def defer_with_limit(workplace: Workplace, limit: timedelta) -> tuple[RayJobTrigger, Any]:
    operator, context = workplace.operator(runtime=ON_RAY), workplace.context(max_tries=1)
    operator.execution_timeout = limit
    with pytest.raises(TaskDeferred) as caught:
        operator.execute(context)
    assert caught.value.timeout is None, "Airflow's own limit would leave the job running"
    assert isinstance(caught.value.trigger, RayJobTrigger)
    return caught.value.trigger, context["ti"]


def test_the_time_limit_counts_from_the_attempts_start(workplace: Workplace, ray: RayApi) -> None:
    trigger, ti = defer_with_limit(workplace, timedelta(hours=3))
    assert trigger.deadline == (ti.start_date + timedelta(hours=3)).timestamp()
    assert RayJobTrigger(**trigger.serialize()[1]).deadline == trigger.deadline


TIME_IS_OVER = "the task's execution_timeout is over: its job on Ray "


@pytest.mark.parametrize(
    ("refuses", "error"), [(False, "was stopped$"), (True, "stops when it looks into its record; .*gone")]
)
def test_a_job_whose_time_is_over_is_stopped_and_followed_by_nobody(
    workplace: Workplace, ray: RayApi, refuses: bool, error: str
) -> None:
    trigger, _ = defer_with_limit(workplace, timedelta(0))
    answer = ray.answer

    def answer_some(method: str, path: str, content: bytes) -> tuple[int, Any]:
        is_gone = refuses and path.endswith("/stop")
        return (500, "gone") if is_gone else answer(method, path, content)

    ray.answer = answer_some  # type: ignore[method-assign]
    trigger.poll_interval = 0.01
    event = asyncio.run(first_event(trigger)).payload
    assert ray.stopped == ([] if refuses else [job_of(1)])
    with pytest.raises(AirflowException, match=f"{TIME_IS_OVER}{error}") as caught:
        go_on(workplace, event=event, max_tries=1)
    assert not isinstance(caught.value, AirflowFailException)
    tags = workplace.tracking.runs["run-1"].tags
    assert tags["post_training.error"].startswith(TIME_IS_OVER)
    assert tags[FOLLOWED] == "", "by which a trainer that could not be stopped sees that nobody wants it"
    assert defer(workplace, attempt=2, max_tries=1).submission_id == job_of(2)


def test_a_job_that_was_done_when_its_time_was_over_counts(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace)
    end(ray, 1, COMPLETED)
    event = {"status": None, "error": "the time is over", "left": True}
    assert go_on(workplace, event=event)["mlflow_run_id"] == "run-1"
    assert workplace.tracking.runs["run-1"].status == "FINISHED"


def test_a_job_that_its_cluster_has_lost_is_submitted_again(
    workplace: Workplace, ray: RayApi, caplog: pytest.LogCaptureFixture
) -> None:
    defer(workplace)
    ray.jobs.clear()
    ray.packages.clear()
    caplog.clear()
    with pytest.raises(TaskDeferred) as deferred:
        go_on(workplace)
    assert isinstance(deferred.value.trigger, RayJobTrigger)
    assert deferred.value.trigger.submission_id == job_of(1)
    assert [*ray.jobs] == [job_of(1)]
    assert ray.spec_of(job_of(1))["attempt_id"] == attempt_id(1)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"does not know job {job_of(1)} any more" in said


def test_a_retry_follows_the_job_of_a_lost_worker(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace, max_tries=1)
    assert defer(workplace, attempt=2, max_tries=1).submission_id == job_of(1)
    assert list(ray.jobs) == [job_of(1)]
    tags = workplace.tracking.runs["run-1"].tags
    assert (tags["post_training.attempt_id"], tags[FOLLOWED]) == (attempt_id(2), attempt_id(1))
    end(ray, 1, COMPLETED)
    assert go_on(workplace, attempt=2, max_tries=1)["mlflow_run_id"] == "run-1"
    assert workplace.tracking.runs["run-1"].status == "FINISHED"


def test_a_retry_after_a_failure_has_a_job_of_its_own(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace, max_tries=1)
    end(ray, 1, {"status": "failed", "error": "a node was lost"})
    with pytest.raises(AirflowException, match="a node was lost"):
        go_on(workplace, max_tries=1)
    assert workplace.tracking.runs["run-1"].status == "RUNNING"
    assert defer(workplace, attempt=2, max_tries=1).submission_id == job_of(2)
    assert ray.spec_of(job_of(2))["begun"] is True
    assert workplace.tracking.runs["run-1"].tags[FOLLOWED] == attempt_id(2)


def test_a_failure_that_stays_is_not_tried_again(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace)
    error = "runtime.num_nodes must be at most 1, got 2"
    end(ray, 1, {"status": "failed", "error": error, "permanent": True})
    with pytest.raises(AirflowFailException, match=error):
        go_on(workplace)
    run = workplace.tracking.runs["run-1"]
    assert (run.status, run.tags["post_training.error"]) == ("FAILED", error)


def test_a_job_that_leaves_no_result_says_what_ray_says(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace)
    end(ray, 1, None, "The driver's node died.")
    with pytest.raises(AirflowException, match=r"ended as FAILED without a result: The driver's node died\."):
        go_on(workplace)
    assert workplace.tracking.files == {"logs/train-1.log": "loss 1.5\n"}


def test_a_cancelled_job_is_not_taken_up_again(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace)
    workplace.tracking.set_tags("run-1", {"post_training.cancelled_attempt": attempt_id(1)})
    with pytest.raises(AirflowFailException, match="cancelled"):
        go_on(workplace)
    assert list(ray.jobs) == [job_of(1)]


def test_a_task_that_is_killed_while_it_submits_stops_the_job(workplace: Workplace, ray: RayApi) -> None:
    operator = workplace.operator(runtime=ON_RAY)
    answer = ray.answer

    def kill_in_between(method: str, path: str, content: bytes) -> tuple[int, Any]:
        operator._stopped = True
        return answer(method, path, content)

    ray.answer = kill_in_between  # type: ignore[method-assign]
    with pytest.raises(AirflowException, match="stopped"):
        operator.execute(workplace.context())
    assert ray.stopped == [job_of(1)]


def test_a_cluster_that_does_not_answer_fails_the_attempt(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_ADDRESS", address)
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_PATIENCE", "1")
    with pytest.raises(AirflowException, match=f"ray_address must lead to .* got '{address}'") as caught:
        workplace.operator(runtime=ON_RAY).execute(workplace.context())
    assert not isinstance(caught.value, AirflowFailException)
    run = workplace.tracking.runs["run-1"]
    assert (run.status, address in run.tags["post_training.error"]) == ("FAILED", True)
    assert run.tags["post_training.followed_attempt"] == ""  # what may have begun there stops


def test_a_cluster_that_is_away_for_a_moment_is_asked_again(
    workplace: Workplace, ray: RayApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("post_training.operators.patience.PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__RAY_PATIENCE", "600")
    answer, tries = ray.answer, []

    def answer_later(method: str, path: str, content: bytes) -> tuple[int, Any]:
        tries.append(path)
        return (503, "busy") if len(tries) % 2 else answer(method, path, content)

    ray.answer = answer_later  # type: ignore[method-assign]
    defer(workplace)
    end(ray, 1, COMPLETED)
    assert go_on(workplace)["mlflow_run_id"] == "run-1"


def test_a_cluster_that_the_trigger_has_waited_for_is_asked_once(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace)
    tries = []

    def answer(*call: Any) -> tuple[int, Any]:
        tries.append(call)
        return 503, "busy"

    ray.answer = answer  # type: ignore[method-assign]
    with pytest.raises(AirflowException, match="busy"):
        go_on(workplace, event={"status": None, "error": "no answer for 300 s"})
    assert len(tries) == 1


def test_a_wrong_token_is_told_at_once(
    workplace: Workplace, ray: RayApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("post_training.operators.patience.PAUSE_SECONDS", 0.01)
    answers = iter([(401, "Unauthorized")])
    ray.answer = lambda *call: next(answers, (400, "asked again"))  # type: ignore[method-assign]
    with pytest.raises(AirflowException, match="ray_token must be the token"):
        workplace.operator(runtime=ON_RAY).execute(workplace.context())


def test_a_deployment_that_keeps_no_states_refuses_the_job(
    workplace: Workplace, ray: RayApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__POST_TRAINING__KEEP_STATE_IN_MLFLOW", "False")
    with pytest.raises(
        AirflowFailException, match=r"runtime\.launcher: must be local: .*keep_state_in_mlflow"
    ):
        workplace.operator(runtime=ON_RAY).execute(workplace.context())
    assert ray.jobs == {}
    assert workplace.tracking.runs["run-1"].status == "FAILED"


def test_a_deployment_without_a_cluster_refuses_the_job(workplace: Workplace) -> None:
    with pytest.raises(
        AirflowFailException, match=r"runtime\.launcher: must be local: .*ray_address is empty"
    ):
        workplace.operator(runtime=ON_RAY).execute(workplace.context())
    assert workplace.tracking.runs["run-1"].status == "FAILED"


def test_the_deployments_default_launcher_is_used(
    workplace: Workplace, ray: RayApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch, host="http://airflow/post-training", extra={"runtime": {"launcher": "ray"}})
    with pytest.raises(TaskDeferred):
        workplace.operator(runtime={"num_nodes": 2}).execute(workplace.context())
    assert list(ray.jobs) == [job_of(1)]
    assert ray.spec_of(job_of(1))["request"]["runtime"]["launcher"] == "ray"


def test_a_trainer_of_the_workers_own_is_followed_instead(
    workplace: Workplace, ray: RayApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the deployment's default is another by then, for the request is the same."""
    host = "http://airflow/post-training"
    connect(monkeypatch, host=host, extra={"runtime": {"launcher": "ray"}})
    with pytest.raises(TaskDeferred):
        workplace.operator().execute(workplace.context(max_tries=1))
    connect(monkeypatch, host=host)
    workplace.operator().execute(workplace.context(attempt=2, max_tries=1))
    assert workplace.tracking.runs["run-1"].tags[FOLLOWED] == ""


def test_another_training_stops_the_job_of_the_one_before(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace, max_tries=1)
    with pytest.raises(TaskDeferred):
        workplace.operator(runtime={**ON_RAY, "seed": 8}).execute(workplace.context(attempt=2, max_tries=1))
    assert ray.stopped == [job_of(1)]
    assert list(ray.jobs) == [job_of(1), f"post-training-run-2-{attempt_id(2)}"]


async def first_event(trigger: RayJobTrigger) -> TriggerEvent:
    return await anext(aiter(trigger.run()))


def test_a_trigger_shows_each_line_once_and_fires_at_the_end(
    workplace: Workplace, ray: RayApi, capsys: pytest.CaptureFixture[str]
) -> None:
    defer(workplace)
    job, answer, looks = ray.jobs[job_of(1)], ray.answer, []

    def answer_later(method: str, path: str, content: bytes) -> tuple[int, Any]:
        if path.endswith("/logs"):
            looks.append(path)
            job.log = "one\ntw" if len(looks) == 1 else f"one\ntwo\n{RESULT_LINE}{{}}\n"
            job.status = "RUNNING" if len(looks) == 1 else "SUCCEEDED"
        return answer(method, path, content)

    ray.answer = answer_later  # type: ignore[method-assign]
    event = asyncio.run(first_event(RayJobTrigger(job_of(1), 0.01)))
    assert event.payload == {"status": "SUCCEEDED", "error": None}
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split("]")[1].split("[")[0].strip() for line in lines if "RayJobTrigger" in line]
    assert shown == ["one", "two"]


def test_a_trigger_gives_up_a_cluster_that_does_not_answer_for_too_long(ray: RayApi) -> None:
    ray.answer = lambda *call: (500, "the head is gone")  # type: ignore[method-assign]
    event = asyncio.run(first_event(RayJobTrigger("one", 0.01)))
    assert "ray_address must lead to a Ray cluster's Jobs API" in event.payload["error"]
    assert "the head is gone" in event.payload["error"]


def test_a_trigger_is_made_again_from_what_it_serializes_and_stops_its_job(
    workplace: Workplace, ray: RayApi
) -> None:
    trigger = defer(workplace)
    path, arguments = trigger.serialize()
    assert path == "post_training.operators.triggers.RayJobTrigger"
    asyncio.run(RayJobTrigger(**arguments).on_kill())
    assert ray.stopped == [job_of(1)]


@pytest.mark.parametrize(
    ("state", "stopped"),
    [
        ("deferred", []),
        ("scheduled", []),
        ("queued", []),
        ("running", []),
        ("up_for_retry", []),
        ("failed", [job_of(1)]),
        ("success", [job_of(1)]),
        (None, [job_of(1)]),
    ],
)
def test_a_job_goes_on_while_its_task_waits_in_another_triggerer_or_has_gone_on(
    workplace: Workplace, ray: RayApi, monkeypatch: pytest.MonkeyPatch, state: str | None, stopped: list[str]
) -> None:
    trigger = defer(workplace)
    trigger.task_instance = workplace.context()["ti"]
    asked = []

    class Supervisor:
        def send(self, message: GetTaskStates) -> TaskStatesResult:
            asked.append(message)
            return TaskStatesResult(task_states={message.run_ids[0]: {message.task_ids[0]: state}})

    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(), raising=False)
    asyncio.run(trigger.on_kill())
    assert ray.stopped == stopped
    (question,) = asked
    assert question == GetTaskStates(
        dag_id=KEY.dag_id, run_ids=[KEY.run_id], task_ids=[KEY.task_id], map_index=KEY.map_index
    )


@pytest.mark.parametrize("answers", [True, False])
def test_a_trigger_asks_airflow_before_it_must(
    workplace: Workplace, ray: RayApi, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """The first question of a triggerer takes more seconds than a job that is to be stopped may have."""
    trigger = defer(workplace)
    trigger.task_instance = workplace.context()["ti"]
    ray.jobs[job_of(1)].status = "SUCCEEDED"
    asked = []

    class Supervisor:
        def send(self, message: GetTaskStates) -> TaskStatesResult:
            asked.append(message)
            if not answers:
                raise RuntimeError("database is locked")
            return TaskStatesResult(task_states={message.run_ids[0]: {message.task_ids[0]: "deferred"}})

    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(), raising=False)
    event = asyncio.run(first_event(trigger))
    assert event.payload == {"status": "SUCCEEDED", "error": None}
    assert len(asked) == 1


def test_a_job_is_stopped_though_the_cluster_refuses_at_first(workplace: Workplace, ray: RayApi) -> None:
    defer(workplace)
    answer, tries = ray.answer, []

    def answer_later(method: str, path: str, content: bytes) -> tuple[int, Any]:
        tries.append(path)
        return (500, "busy") if len(tries) < 3 else answer(method, path, content)

    ray.answer = answer_later  # type: ignore[method-assign]
    asyncio.run(RayJobTrigger(job_of(1), 0.01).on_kill())
    assert (len(tries), ray.stopped) == (3, [job_of(1)])


def test_a_triggerer_that_knows_no_cluster_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW__POST_TRAINING__RAY_ADDRESS", raising=False)
    event = asyncio.run(first_event(RayJobTrigger("one", 0.01)))
    assert "ray_address is empty" in event.payload["error"]
