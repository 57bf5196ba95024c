"""The API with its real collaborators: Airflow's database and users, the connection's MLflow."""

from __future__ import annotations

from airflow.sdk.exceptions import AirflowNotFoundException
from fastapi import FastAPI

from post_training.airflow_runs import AirflowRuns
from post_training.api.app import create_app
from post_training.api.auth import current_access
from post_training.dataset_records import DatasetRecords
from post_training.dataset_registry import DatasetService
from post_training.datasets import Resolver
from post_training.errors import RecordUnavailableError
from post_training.job_views import JobViews
from post_training.jobs import JobService
from post_training.logs import LogService
from post_training.operators.hooks import MLflowHook, PostTrainingHook
from post_training.settings import load_settings
from post_training.tracking import Tracking


def build_app() -> FastAPI:
    """Build the app of this deployment.

    :raises ValueError: if a setting is out of range.
    """
    settings = load_settings()

    def tracking() -> Tracking:
        try:
            return MLflowHook(settings.mlflow_conn_id).get_conn()
        except (AirflowNotFoundException, ValueError) as error:
            raise RecordUnavailableError(
                f"the connection {settings.mlflow_conn_id!r} does not lead to MLflow: {error}"
            ) from None

    records = DatasetRecords(tracking)
    resolver = Resolver(settings, registered=records.uri)
    runs = AirflowRuns()
    hook = PostTrainingHook(settings.post_training_conn_id)
    service = JobService(runs, tracking, resolver, hook.runtime_defaults)
    datasets = DatasetService(records, resolver, runs.update_asset)
    logs = LogService(runs, service)
    views = JobViews(runs, tracking, service)
    return create_app(service, datasets, logs, views, current_access, max_body_bytes=settings.max_body_bytes)
