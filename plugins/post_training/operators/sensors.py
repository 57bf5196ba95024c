"""The sensor that waits for a job to end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.configuration import conf
from airflow.sdk import BaseSensorOperator
from airflow.sdk.exceptions import AirflowFailException

from post_training.errors import RecordUnavailableError
from post_training.operators.hooks import PostTrainingHook
from post_training.operators.triggers import PostTrainingJobTrigger
from post_training.settings import load_settings

if TYPE_CHECKING:
    from airflow.sdk import Context


class PostTrainingJobSensor(BaseSensorOperator):
    """Wait until a job has ended; succeed if it completed, fail otherwise.

    :param job_uuid: the job's id.
    :param post_training_conn_id: connection of the API; None is the deployment's setting.
    :param deferrable: wait in the triggerer instead of in a worker slot; None is Airflow's
        ``[operators] default_deferrable``.
    """

    template_fields: Sequence[str] = ("job_uuid",)

    def __init__(
        self,
        *,
        job_uuid: str,
        post_training_conn_id: str | None = None,
        deferrable: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.job_uuid = job_uuid
        self.post_training_conn_id = post_training_conn_id
        self.deferrable = deferrable

    @cached_property
    def conn_id(self) -> str:
        """The API's connection."""
        return self.post_training_conn_id or load_settings().post_training_conn_id

    def execute(self, context: Context) -> Any:
        """Wait, in the triggerer if deferrable.

        :raises AirflowFailException: if the job did not complete.
        """
        deferrable = self.deferrable
        if deferrable is None:
            deferrable = conf.getboolean("operators", "default_deferrable", fallback=False)
        if not deferrable or self.poke(context):
            return super().execute(context)
        self.defer(
            trigger=PostTrainingJobTrigger(self.job_uuid, self.conn_id, self.poke_interval),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout),
        )

    def poke(self, context: Context) -> bool:
        """Look once; an API that does not answer is asked again.

        :raises AirflowFailException: if the job ended and did not complete.
        """
        try:
            status = PostTrainingHook(self.conn_id).get_conn().job_status(self.job_uuid)
        except RecordUnavailableError as error:
            self.log.warning("%s", error)
            return False
        if status.status.ended:
            self._conclude(status.status.value, status.error)
        return status.status.ended

    def execute_complete(self, context: Context, event: dict[str, Any]) -> None:
        """Read the trigger's event.

        :raises AirflowFailException: if the job did not complete.
        """
        self._conclude(event["status"], event["error"])

    def _conclude(self, status: str | None, error: str | None) -> None:
        if status != "completed":
            reason = f": {error}" if error else ""
            raise AirflowFailException(f"job {self.job_uuid!r} ended as {status or 'unknown'}{reason}")
