"""What the page's scripts ask: a page of the list, one job, curves, and the form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.routing import APIRoute

from post_training.api.routes import JobUuidQuery
from post_training.errors import ForbiddenError, InvalidRequestError
from post_training.job_form import form_of, request_of, values_of
from post_training.job_views import MAX_PAGE_JOBS, JobViews
from post_training.jobs import JobService
from post_training.schemas.jobs import JobStatus, PostTrainingJob
from post_training.schemas.requests import REQUESTS
from post_training.schemas.views import Curves, Form, FormSubmit, JobsPage, JobView

MAX_COMPARED = 8
"""As many as the page has colors for their curves."""
_MAX_ID_LENGTH = 1000

Text = Annotated[str, Query(max_length=200)]
Name = Annotated[str | None, Query(min_length=1, max_length=_MAX_ID_LENGTH)]


def view_routes(
    service: JobService, views: JobViews, current_access: Callable[..., Any], route_class: type[APIRoute]
) -> APIRouter:
    """Return the routes of the page's data."""
    router = APIRouter(prefix="/ui/data", route_class=route_class, include_in_schema=False)

    @router.get("/jobs")
    def jobs(
        status: JobStatus | None = None,
        text: Text = "",
        dag_id: Name = None,
        run_id: Name = None,
        offset: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_JOBS)] = 25,
        access: Any = Depends(current_access),
    ) -> JobsPage:
        """Return a page of the list."""
        return views.page(
            access, status=status, text=text, dag_id=dag_id, run_id=run_id, offset=offset, limit=limit
        )

    @router.get("/job")
    def job(job_uuid: JobUuidQuery, access: Any = Depends(current_access)) -> JobView:
        """Return one job."""
        return views.job(job_uuid, access)

    @router.get("/curves")
    def curves(
        jobs: Annotated[str, Query(min_length=1, max_length=MAX_COMPARED * (_MAX_ID_LENGTH + 1))],
        access: Any = Depends(current_access),
    ) -> Curves:
        """Return the curves of the jobs whose ids stand between commas."""
        named = list(dict.fromkeys(jobs.split(",")))
        if len(named) > MAX_COMPARED:
            raise InvalidRequestError.of("jobs", f"may name {MAX_COMPARED} jobs, got {len(named)}")
        return views.curves(named, access)

    @router.get("/forms")
    def forms(clone: Name = None, access: Any = Depends(current_access)) -> list[Form]:
        """Return the forms of the methods that the caller may start; of a job to be cloned, its own."""
        method, request = views.request(clone, access) if clone is not None else (None, {})
        allowed = [name for name in REQUESTS if access.may_trigger(name) and method in (None, name)]
        if not allowed:
            raise ForbiddenError(f"{access.user_name} may not start such jobs")
        return [form_of(name, values_of(name, request)) for name in allowed]

    @router.post("/jobs")
    def submit(filled: FormSubmit, access: Any = Depends(current_access)) -> PostTrainingJob:
        """Start the job that a filled form describes."""
        return service.submit(request_of(filled), access)

    return router
