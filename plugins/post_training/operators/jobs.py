"""The operators that read and stop jobs, from any worker, through the HTTP API."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from post_training.client import PostTrainingClient
from post_training.operators.hooks import PostTrainingHook
from post_training.settings import load_settings

if TYPE_CHECKING:
    from airflow.sdk import Context


class _ApiOperator(BaseOperator):
    """An operator that calls the HTTP API.

    :param post_training_conn_id: connection of the API; None is the deployment's setting.
    """

    def __init__(self, *, post_training_conn_id: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.post_training_conn_id = post_training_conn_id

    @cached_property
    def hook(self) -> PostTrainingHook:
        """The API's hook."""
        return PostTrainingHook(self.post_training_conn_id or load_settings().post_training_conn_id)

    @cached_property
    def api(self) -> PostTrainingClient:
        """The API, logged in."""
        return self.hook.get_conn()


class GetTrainingJobsOperator(_ApiOperator):
    """Return the ids of all jobs that the connection's user may see, newest first."""

    def execute(self, context: Context) -> list[str]:
        """Return the job ids."""
        return [job.job_uuid for job in self.api.list_jobs().data]


class _JobOperator(_ApiOperator):
    """An operator on one job.

    :param job_uuid: the job's id.
    """

    template_fields: Sequence[str] = ("job_uuid",)

    def __init__(self, *, job_uuid: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job_uuid = job_uuid


class GetTrainingJobStatusOperator(_JobOperator):
    """Return a job's status, its times, resources and checkpoints."""

    def execute(self, context: Context) -> dict[str, Any]:
        """Return the status response as JSON values.

        :raises JobNotFoundError: if there is no such job.
        """
        return self.api.job_status(self.job_uuid).model_dump(mode="json")


class GetTrainingJobArtifactsOperator(_JobOperator):
    """Return a job's checkpoints, oldest first."""

    def execute(self, context: Context) -> list[dict[str, Any]]:
        """Return the checkpoints as JSON values.

        :raises JobNotFoundError: if there is no such job.
        """
        artifacts = self.api.job_artifacts(self.job_uuid)
        return [checkpoint.model_dump(mode="json") for checkpoint in artifacts.checkpoints]


class CancelTrainingJobOperator(_JobOperator):
    """Stop a job; what it made so far is kept."""

    def execute(self, context: Context) -> None:
        """Stop the job.

        :raises JobNotFoundError: if there is no such job.
        :raises JobConflictError: if it has ended.
        """
        self.api.cancel_job(self.job_uuid)


class ReconcileTrainingJobsOperator(_ApiOperator):
    """Bring MLflow's open runs and Airflow's tasks to agree; runs of cut-off submits are deleted.

    Also of tasks that are no jobs: retrainings, evaluations, trials.
    """

    def execute(self, context: Context) -> dict[str, int]:
        """Return how many runs were checked, mended, stopped and discarded."""
        return self.api.reconcile().model_dump()
