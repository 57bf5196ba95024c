"""The job operators, the sensor and its trigger, against the real API."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, TaskDeferred

from post_training.errors import JobNotFoundError
from post_training.job_ids import TaskKey
from post_training.operators.jobs import (
    CancelTrainingJobOperator,
    GetTrainingJobArtifactsOperator,
    GetTrainingJobsOperator,
    GetTrainingJobStatusOperator,
)
from post_training.operators.sensors import PostTrainingJobSensor
from post_training.operators.triggers import PostTrainingJobTrigger
from post_training.record import identity_tags
from post_training.schemas.jobs import Checkpoint
from tests.fakes import NOW, task
from tests.operators.conftest import ApiServer

KEY = TaskKey("supervised_fine_tune", "job-1", "train")
CONTEXT: Any = {}


def test_each_operator_calls_its_method(api: ApiServer) -> None:
    api.runs.add(task(KEY, "running", {"mlflow_run_id": "run-1"}))
    api.tracking.create_run(name="", experiment=None, tags=identity_tags(KEY), params={}, request={})
    api.tracking.made.append(
        Checkpoint(identifier="c", created_at=NOW, epoch=0, post_training_job_id="job-1", path="models:/m-1")
    )
    assert GetTrainingJobsOperator(task_id="list").execute(CONTEXT) == ["job-1"]
    status = GetTrainingJobStatusOperator(task_id="status", job_uuid="job-1").execute(CONTEXT)
    assert (status["status"], status["checkpoints"][0]["path"]) == ("in_progress", "models:/m-1")
    (artifact,) = GetTrainingJobArtifactsOperator(task_id="artifacts", job_uuid="job-1").execute(CONTEXT)
    assert artifact["identifier"] == "c"
    assert CancelTrainingJobOperator(task_id="cancel", job_uuid="job-1").execute(CONTEXT) is None
    assert api.runs.tasks["job-1"].state == "failed"


def test_an_unknown_job_fails_the_task(api: ApiServer) -> None:
    with pytest.raises(JobNotFoundError):
        GetTrainingJobStatusOperator(task_id="status", job_uuid="nothing").execute(CONTEXT)


def test_job_ids_are_templated() -> None:
    for operator in (
        GetTrainingJobStatusOperator,
        GetTrainingJobArtifactsOperator,
        CancelTrainingJobOperator,
        PostTrainingJobSensor,
    ):
        assert "job_uuid" in operator.template_fields


@pytest.mark.parametrize(("state", "done"), [("running", False), ("success", True)])
def test_the_sensor_looks(api: ApiServer, state: str, done: bool) -> None:
    api.runs.add(task(KEY, state))
    assert PostTrainingJobSensor(task_id="wait", job_uuid="job-1").poke(CONTEXT) is done


def test_the_sensor_waits_out_an_api_that_does_not_answer(api: ApiServer) -> None:
    api.runs.add(task(KEY, "success"))
    api.tracking.down = True
    assert PostTrainingJobSensor(task_id="wait", job_uuid="job-1").poke(CONTEXT) is False


def test_a_failed_job_fails_the_sensor(api: ApiServer) -> None:
    api.runs.add(task(KEY, "failed"))
    with pytest.raises(AirflowFailException, match="'job-1' ended as failed: The Airflow task ended"):
        PostTrainingJobSensor(task_id="wait", job_uuid="job-1").poke(CONTEXT)


def test_a_deferrable_sensor_hands_over_to_the_trigger(api: ApiServer) -> None:
    api.runs.add(task(KEY, "running"))
    sensor = PostTrainingJobSensor(task_id="wait", job_uuid="job-1", deferrable=True, poke_interval=0.01)
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute(CONTEXT)
    trigger = deferred.value.trigger
    path, arguments = trigger.serialize()
    assert path == "post_training.operators.triggers.PostTrainingJobTrigger"
    assert arguments == {
        "job_uuid": "job-1",
        "post_training_conn_id": "post_training_default",
        "poll_interval": 0.01,
    }

    async def fire() -> Any:
        async for event in PostTrainingJobTrigger(**arguments).run():
            return event.payload

    async def finish_meanwhile() -> Any:
        firing = asyncio.create_task(fire())
        await asyncio.sleep(0)
        api.runs.tasks["job-1"] = replace(api.runs.tasks["job-1"], state="success")
        return await firing

    event = asyncio.run(finish_meanwhile())
    assert event == {"status": "completed", "error": None}
    sensor.execute_complete(CONTEXT, event)


def test_a_sensor_does_not_defer_for_an_ended_job(api: ApiServer) -> None:
    api.runs.add(task(KEY, "success"))
    sensor = PostTrainingJobSensor(task_id="wait", job_uuid="job-1", deferrable=True)
    assert sensor.poke(CONTEXT) is True


def test_the_trigger_waits_out_an_api_that_does_not_answer(api: ApiServer) -> None:
    api.runs.add(task(KEY, "success"))
    api.tracking.down = True

    async def fire() -> Any:
        trigger = PostTrainingJobTrigger("job-1", "post_training_default", 0.01)
        events = trigger.run()
        firing = asyncio.create_task(anext(events))
        while not api.tracking.asked:
            await asyncio.sleep(0.01)
        api.tracking.down = False
        return (await firing).payload

    assert asyncio.run(fire())["status"] == "completed"


def test_the_trigger_reports_what_cannot_be_waited_for(api: ApiServer) -> None:
    async def fire() -> Any:
        async for event in PostTrainingJobTrigger("nothing", "post_training_default", 0.01).run():
            return event.payload

    event = asyncio.run(fire())
    assert event == {"status": None, "error": "no post-training job 'nothing'"}
    with pytest.raises(AirflowFailException, match="ended as unknown: no post-training job 'nothing'"):
        PostTrainingJobSensor(task_id="wait", job_uuid="nothing").execute_complete(CONTEXT, event)
