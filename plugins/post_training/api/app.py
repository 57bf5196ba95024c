"""The FastAPI application: three path families of one API, and the page; all behind Airflow's login."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from fastapi import Depends, FastAPI

from post_training import __version__
from post_training.api.capacity import Capacity, threaded_routes
from post_training.api.dataset_routes import dataset_routes
from post_training.api.errors import add_error_handlers
from post_training.api.limits import BodyLimit, SendTimeout
from post_training.api.log_routes import log_routes
from post_training.api.log_stream import Pace
from post_training.api.page_routes import page_routes
from post_training.api.query import check_query
from post_training.api.routes import job_routes, training_routes
from post_training.api.view_routes import view_routes
from post_training.dataset_registry import DatasetService
from post_training.job_views import JobViews
from post_training.jobs import JobService
from post_training.logs import LogService


def create_app(
    service: JobService,
    datasets: DatasetService,
    logs: LogService,
    views: JobViews,
    current_access: Callable[..., Any],
    *,
    max_body_bytes: int,
    capacity: Capacity | None = None,
    pace: Pace | None = None,
    send_seconds: float = 60.0,
) -> FastAPI:
    """Build the API.

    :param current_access: FastAPI dependency that returns the caller's ``jobs.Access`` or raises 401.
    :param max_body_bytes: largest request body in bytes.
    :param capacity: how much it does at once.
    :param pace: how often those look who follow a log.
    :param send_seconds: how long a client may not read its answer.
    """
    app = FastAPI(
        title="Post-training",
        version=__version__,
        description="LLM post-training jobs: the PostTraining API over Airflow and MLflow.",
        dependencies=[Depends(current_access)],
        openapi_url=None,
        docs_url=None,  # FastAPI's pages load their scripts from a network of others
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(SendTimeout, seconds=send_seconds)
    add_error_handlers(app)
    capacity = capacity or Capacity()
    route_class = threaded_routes(capacity.calls)
    routers = (
        training_routes(service, current_access, route_class),
        job_routes(service, current_access, route_class),
        log_routes(logs, current_access, capacity, pace or Pace()),
    )
    strict = [Depends(check_query)]
    for prefix, router in product(("/v1", "/v1alpha"), routers):
        app.include_router(router, prefix=f"{prefix}/post-training", dependencies=strict)
    for prefix in ("/v1", "/v1beta"):
        of_datasets = dataset_routes(datasets, current_access, route_class)
        app.include_router(of_datasets, prefix=prefix, dependencies=strict)
    app.include_router(view_routes(service, views, current_access, route_class), dependencies=strict)
    app.include_router(page_routes())

    @app.get("/openapi.json", include_in_schema=False, dependencies=strict)
    async def openapi() -> dict[str, Any]:
        return description(app)

    return app


def description(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document without the 422 answers that FastAPI adds: an invalid body is 400 here."""
    document = app.openapi()
    for item in document["paths"].values():
        for operation in item.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document
