"""Links from a task's page; those to MLflow are there as soon as the running task knows where they lead.

Airflow itself stores a task's links only when the attempt ends, as XComs. A running task notes each before,
so that it can be followed at once; one that leads nowhere yet is empty, and Airflow's page leaves it out.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlencode

from airflow.sdk import BaseOperatorLink
from airflow.sdk.exceptions import AirflowRuntimeError

from post_training.job_ids import TaskKey, job_uuid_of

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

log = logging.getLogger(__name__)

JOB_PAGE = "post-training/ui/job"
"""Below Airflow's own address, to which its pages relate what has no host: the origin is the browser's."""


class NotedLink(BaseOperatorLink):
    """A link whose address the task learns while it runs."""

    attribute: ClassVar[str]
    """Of the operator: where the address is kept until the attempt ends."""

    def note(self, operator: BaseOperator, ti: Any, url: str) -> None:
        """Let the task lead there from now on.

        :param ti: the running task instance.
        """
        setattr(operator, self.attribute, url)
        _push(ti, self.xcom_key, url)

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address that the task has noted; empty if it has none."""
        return getattr(operator, self.attribute, None) or ""


class MLflowRunLink(NotedLink):
    """To the run in MLflow in which the task works."""

    name = "MLflow run"
    attribute = "mlflow_run_url"


class CheckpointLink(NotedLink):
    """To the files of the job's newest checkpoint in MLflow."""

    name = "Checkpoint"
    attribute = "checkpoint_url"


class ModelVersionLink(NotedLink):
    """To the version in MLflow's registry that the task has made the champion."""

    name = "Model version"
    attribute = "model_version_url"


class JobLink(BaseOperatorLink):
    """To the job's own page, of its task and of those that search for it; there from the task's begin."""

    name = "Job"

    def note(self, operator: BaseOperator, ti: Any) -> None:
        """Let the task lead there from now on."""
        _push(ti, self.xcom_key, self.get_link(operator, ti_key=ti))

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the page's address below Airflow's own."""
        job_task_id = getattr(operator, "job_task_id", None)
        mapped = ti_key.map_index if ti_key.map_index is not None and job_task_id is None else -1
        key = TaskKey(ti_key.dag_id, ti_key.run_id, job_task_id or ti_key.task_id, mapped)
        return f"{JOB_PAGE}?{urlencode({'job_uuid': job_uuid_of(key)})}"


def _push(ti: Any, key: str, url: str) -> None:
    """Store a link's address; nothing hangs on it."""
    try:
        ti.xcom_push(key=key, value=url)
    except AirflowRuntimeError as error:
        log.warning("Airflow does not keep the link to %s: %s", url, error)
