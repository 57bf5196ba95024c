"""The routes of the published client.

=================  ===========================================  =======================
client             paths below ``/post-training``               job_uuid
=================  ===========================================  =======================
0.1.0 to 0.2.23    ``/v1/…/job/{status,artifacts,cancel}``      query; cancel: body
0.3.0 and later    ``/v1alpha/…/job/…``                         the same; from 0.5 by extra_query
later ones         ``/v1alpha/…/jobs/{job_uuid}/…``             path, empty body
=================  ===========================================  =======================

They are sync functions, because MLflow's and Airflow's own calls block; ``capacity`` says in which threads.
A job's log has routes of its own, in ``log_routes``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.routing import APIRoute

from post_training.api.errors import documented
from post_training.errors import InvalidRequestError
from post_training.jobs import JobService
from post_training.schemas.base import StrictModel
from post_training.schemas.jobs import (
    ListPostTrainingJobsResponse,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobStatusResponse,
    ReconcileJobsResponse,
)
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.rlhf import PreferenceBody

JobUuidQuery = Annotated[str, Query(min_length=1, max_length=1000, description="The job's id.")]


class CancelTrainingJobRequest(StrictModel):
    """Body of ``job/cancel``."""

    job_uuid: str


def training_routes(
    service: JobService, current_access: Callable[..., Any], route_class: type[APIRoute]
) -> APIRouter:
    """Return the two routes that start jobs."""
    router = APIRouter(
        tags=["training"], route_class=route_class, responses=documented(400, 401, 403, 409, 413, 503)
    )

    @router.post("/supervised-fine-tune")
    def supervised_fine_tune(
        request: SupervisedFineTuneRequest, access: Any = Depends(current_access)
    ) -> PostTrainingJob:
        """Start supervised fine-tuning. The same job_uuid with the same body answers the same again."""
        return service.submit(request, access)

    @router.post("/preference-optimize")
    def preference_optimize(
        request: PreferenceBody, access: Any = Depends(current_access)
    ) -> PostTrainingJob:
        """Start preference optimization, in either form of its body. The same again answers the same."""
        return service.submit(request, access)

    return router


def job_routes(
    service: JobService, current_access: Callable[..., Any], route_class: type[APIRoute]
) -> APIRouter:
    """Return the routes that read and stop jobs, in both of their shapes."""
    router = APIRouter(tags=["jobs"], route_class=route_class)
    reads: dict[str, tuple[Callable[..., Any], type]] = {
        "status": (service.status, PostTrainingJobStatusResponse),
        "artifacts": (service.artifacts, PostTrainingJobArtifactsResponse),
    }

    @router.get("/jobs", responses=documented(401, 503))
    def get_training_jobs(access: Any = Depends(current_access)) -> ListPostTrainingJobsResponse:
        """List all jobs that the caller may see, newest first."""
        return service.list(access)

    for name, (read, response) in reads.items():
        by_query, by_path = _read_routes(read, current_access)
        common: dict[str, Any] = {
            "response_model": response,
            "description": (read.__doc__ or "").partition("\n")[0],
        }
        router.get(f"/job/{name}", responses=documented(400, 401, 404, 503), **common)(by_query)
        router.get(f"/jobs/{{job_uuid}}/{name}", responses=documented(401, 404, 503), **common)(by_path)

    @router.post("/job/cancel", responses=documented(400, 401, 403, 404, 409, 503))
    def cancel_training_job(
        body: CancelTrainingJobRequest | None = None,
        job_uuid: JobUuidQuery | None = None,
        access: Any = Depends(current_access),
    ) -> None:
        """Stop a job, named in the body or in the query; what it made so far is kept."""
        named = {name for name in (body and body.job_uuid, job_uuid) if name}
        if len(named) != 1:
            raise InvalidRequestError.of("job_uuid", "Field required, once", "missing")
        service.cancel(named.pop(), access)

    @router.post("/jobs/{job_uuid}/cancel", responses=documented(401, 403, 404, 409, 503))
    def cancel_training_job_by_path(job_uuid: str, access: Any = Depends(current_access)) -> None:
        """Stop a job; what it made so far is kept."""
        service.cancel(job_uuid, access)

    @router.post("/reconcile", responses=documented(401, 403, 503))
    def reconcile_training_jobs(access: Any = Depends(current_access)) -> ReconcileJobsResponse:
        """Bring MLflow's open runs and Airflow's tasks to agree, as far as the caller may change them."""
        return service.reconcile(access)

    return router


def _read_routes(
    read: Callable[..., Any], current_access: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def by_query(job_uuid: JobUuidQuery, access: Any = Depends(current_access)) -> Any:
        return read(job_uuid, access)

    def by_path(job_uuid: str, access: Any = Depends(current_access)) -> Any:
        return read(job_uuid, access)

    return by_query, by_path
