"""The FastAPI application: three path families of one API, nothing open to the unauthenticated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from post_training import __version__
from post_training.api.errors import add_error_handlers
from post_training.api.limits import BodyLimit
from post_training.api.routes import job_routes, training_routes
from post_training.jobs import JobService


def create_app(service: JobService, current_access: Callable[..., Any], *, max_body_bytes: int) -> FastAPI:
    """Build the API.

    :param current_access: FastAPI dependency that returns the caller's ``jobs.Access`` or raises 401.
    :param max_body_bytes: largest request body in bytes.
    """
    app = FastAPI(
        title="Post-training",
        version=__version__,
        description="LLM post-training jobs: the PostTraining API over Airflow and MLflow.",
        dependencies=[Depends(current_access)],
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    add_error_handlers(app)
    for prefix in ("/v1", "/v1alpha"):
        app.include_router(training_routes(service, current_access), prefix=f"{prefix}/post-training")
        app.include_router(job_routes(service, current_access), prefix=f"{prefix}/post-training")

    @app.get("/openapi.json", include_in_schema=False)
    def openapi() -> dict[str, Any]:
        return description(app)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="openapi.json", title=app.title)

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
