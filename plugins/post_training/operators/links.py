"""Links from a task's page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey


class MLflowRunLink(BaseOperatorLink):
    """To the job's run in MLflow; there from the moment that the task has found or made it."""

    name = "MLflow run"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the address that the running task has noted; empty before."""
        return getattr(operator, "mlflow_run_url", None) or ""
