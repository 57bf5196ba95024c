"""Waits for a job in the triggerer, without a worker slot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from post_training.errors import RecordUnavailableError
from post_training.operators.hooks import PostTrainingHook
from post_training.schemas.jobs import PostTrainingJobStatusResponse


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
