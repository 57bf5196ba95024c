"""The routes of data sets: ``/v1/datasets``, and ``/v1beta/datasets`` of clients from 0.3.0 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path
from fastapi.routing import APIRoute

from post_training.api.errors import documented
from post_training.dataset_registry import DatasetService
from post_training.schemas.datasets import Dataset, ListDatasetsResponse, RegisterDatasetRequest

DatasetIdPath = Annotated[str, Path(description="The data set's id.")]


def dataset_routes(
    service: DatasetService, current_access: Callable[..., Any], route_class: type[APIRoute]
) -> APIRouter:
    """Return the routes that register, list, get and delete data sets."""
    router = APIRouter(tags=["datasets"], route_class=route_class)

    @router.post("/datasets", responses=documented(400, 401, 403, 413, 503))
    def register_dataset(request: RegisterDatasetRequest, access: Any = Depends(current_access)) -> Dataset:
        """Register rows or a URI. Another content under a known id is its new version; the same is not."""
        return service.register(request, access)

    @router.get("/datasets", responses=documented(401, 403, 503))
    def list_datasets(access: Any = Depends(current_access)) -> ListDatasetsResponse:
        """List all data sets in their current versions, the newest first, without their rows."""
        return service.list(access)

    @router.get("/datasets/{dataset_id}", responses=documented(401, 403, 404, 503))
    def get_dataset(
        dataset_id: Annotated[str, Path(description="ID, or ID@DIGEST for one version of it.")],
        access: Any = Depends(current_access),
    ) -> Dataset:
        """Return a data set with its rows: its current version, or the one that is named."""
        return service.get(dataset_id, access)

    @router.delete("/datasets/{dataset_id}", responses=documented(401, 403, 404, 503))
    def unregister_dataset(dataset_id: DatasetIdPath, access: Any = Depends(current_access)) -> None:
        """Delete a data set and all its versions; jobs that started with it go on."""
        service.delete(dataset_id, access)

    return router
