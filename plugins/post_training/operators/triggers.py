"""Waits for a job in the triggerer, without a worker slot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from math import inf
from time import monotonic, time
from typing import Any

from airflow.sdk import TaskInstanceState
from airflow.triggers.base import BaseTrigger, TriggerEvent

from post_training.errors import ClusterUnavailableError, InvalidRequestError, RecordUnavailableError
from post_training.launch.ray_jobs import RayJobs, without_result
from post_training.operators.hooks import PostTrainingHook
from post_training.operators.on_ray import ray_jobs
from post_training.schemas.jobs import PostTrainingJobStatusResponse
from post_training.settings import load_settings

LONGEST_PAUSE = 60.0
"""Seconds between two looks at a job on Ray whose output takes long to read."""

STOP_TRIES, STOP_PAUSE = 4, 2.0
"""Calls that stop a job, and seconds between two of them: all end within Airflow's 30 s for ``on_kill``."""

TIME_IS_OVER = "the task's execution_timeout is over"

NOBODY_FOLLOWS = frozenset(
    {
        None,  # cleared
        TaskInstanceState.SUCCESS,
        TaskInstanceState.FAILED,
        TaskInstanceState.SKIPPED,
        TaskInstanceState.UPSTREAM_FAILED,
        TaskInstanceState.REMOVED,
    }
)
"""States of a task that does not look at its job again; in all others it does, or its next try does."""


class PostTrainingJobTrigger(BaseTrigger):
    """Fires when a job has ended, with its status.

    :param job_uuid: the job's id.
    :param post_training_conn_id: connection of the API.
    :param poll_interval: seconds between two looks.
    """

    def __init__(self, job_uuid: str, post_training_conn_id: str, poll_interval: float) -> None:
        super().__init__()
        self.job_uuid = job_uuid
        self.post_training_conn_id = post_training_conn_id
        self.poll_interval = poll_interval

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class's path and its arguments."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "job_uuid": self.job_uuid,
                "post_training_conn_id": self.post_training_conn_id,
                "poll_interval": self.poll_interval,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until the job has ended; an API that does not answer is asked again."""
        while True:
            try:
                status = await asyncio.to_thread(self._status)
            except RecordUnavailableError as error:
                self.log.warning("%s", error)
            except Exception as error:
                yield TriggerEvent({"status": None, "error": str(error)})
                return
            else:
                if status.status.ended:
                    yield TriggerEvent({"status": status.status.value, "error": status.error})
                    return
            await asyncio.sleep(self.poll_interval)

    def _status(self) -> PostTrainingJobStatusResponse:
        return PostTrainingHook(self.post_training_conn_id).get_conn().job_status(self.job_uuid)


class RayJobTrigger(BaseTrigger):
    """Fires when a job on the deployment's Ray cluster has ended; until then its output is the task's log.

    A triggerer that starts anew shows the output from its beginning.

    :param submission_id: the job's id on the cluster.
    :param poll_interval: seconds between two looks; where they take long, ten times as long as one took.
    :param deadline: when the job is stopped, in seconds since the epoch; None is never.
    """

    def __init__(self, submission_id: str, poll_interval: float, deadline: float | None = None) -> None:
        super().__init__()
        self.submission_id = submission_id
        self.poll_interval = poll_interval
        self.deadline = deadline

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class's path and its arguments."""
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {
                "submission_id": self.submission_id,
                "poll_interval": self.poll_interval,
                "deadline": self.deadline,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look until the job has ended, its time is over, or the cluster has not answered for too long."""
        try:
            jobs, patience = ray_jobs(), load_settings().ray_patience
        except InvalidRequestError as error:  # this triggerer has other settings than the worker
            yield TriggerEvent({"status": None, "error": str(error)})
            return
        await self._prepare_to_ask()
        shown, answered, pause = 0, monotonic(), self.poll_interval
        while True:
            asked = monotonic()
            try:
                job = await asyncio.to_thread(jobs.find, self.submission_id)
                log = await asyncio.to_thread(jobs.log, self.submission_id) if job else ""
                shown = await asyncio.to_thread(self._show, log, shown)
            except ClusterUnavailableError as error:
                pause = self.poll_interval
                self.log.warning("%s", error)
                if asked - answered > patience:
                    yield TriggerEvent({"status": None, "error": str(error)})
                    return
            else:
                answered = monotonic()
                if job is None or job.ended:
                    yield TriggerEvent({"status": job and job.status, "error": None})
                    return
                pause = max(self.poll_interval, min(LONGEST_PAUSE, 10 * (answered - asked)))
            left = self._seconds_left()
            if left <= 0:
                yield await self._end(jobs)
                return
            await asyncio.sleep(min(pause, left))

    def _seconds_left(self) -> float:
        return inf if self.deadline is None else self.deadline - time()

    async def _end(self, jobs: RayJobs) -> TriggerEvent:
        """Stop a job whose time is over; Airflow's own limit would leave it running."""
        error = f"{TIME_IS_OVER}: its job on Ray was stopped"
        try:
            await self._stop(jobs)
        except ClusterUnavailableError as unavailable:
            error = f"{TIME_IS_OVER}: its job on Ray stops when it looks into its record; {unavailable}"
        return TriggerEvent({"status": None, "error": error, "left": True})

    async def on_kill(self) -> None:
        """Stop the job: somebody has ended the task, or clears it. A triggerer that stops leaves it alone.

        Airflow calls this too in a triggerer that was away for so long that another has taken over what
        waits: the task still waits then, or goes on since the other's trigger has fired; it follows its job.
        """
        if await asyncio.to_thread(self._is_followed):
            self.log.info("the task still follows the job on Ray")
            return
        await self._stop(ray_jobs())
        self.log.info("the job on Ray was asked to end: its task was stopped, or cleared")

    async def _stop(self, jobs: RayJobs) -> None:
        """Stop the job.

        :raises ClusterUnavailableError: if the cluster does not answer.
        """
        for left in reversed(range(STOP_TRIES)):
            try:
                await asyncio.to_thread(jobs.stop, self.submission_id)
                return
            except ClusterUnavailableError as error:
                if not left:
                    raise
                self.log.warning("%s", error)
                await asyncio.sleep(min(self.poll_interval, STOP_PAUSE))

    async def _prepare_to_ask(self) -> None:
        """Ask Airflow once what ``on_kill`` asks: a triggerer's first question takes many seconds.

        For that Airflow makes an API in the process, and ``on_kill`` has 30 s on a machine that may be busy.
        """
        try:
            await asyncio.to_thread(self._is_followed)
        except Exception as error:  # nothing hangs on it yet
            self.log.warning("Airflow does not say how the task is: %s", error)

    def _is_followed(self) -> bool:
        """Whether Airflow says that the task, or its next try, will look at the job."""
        # DAGs are parsed without it: that would take half as long again.
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance  # noqa: PLC0415

        task = self.task_instance
        if task is None:  # Airflow has not bound this trigger to a task
            return False
        found = RuntimeTaskInstance.get_task_states(
            task.dag_id, map_index=task.map_index, task_ids=[task.task_id], run_ids=[task.run_id]
        )
        return not NOBODY_FOLLOWS.issuperset(state for run in found.values() for state in run.values())

    def _show(self, log: str, shown: int) -> int:
        """Log the whole lines behind what was shown; return how much is."""
        end = log.rfind("\n") + 1
        for line in filter(without_result, log[shown:end].splitlines()):
            self.log.info("%s", line)
        return max(shown, end)
