"""What a job's MLflow run says from the start: its params and the tags that lead back to Airflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from post_training.job_ids import TaskKey, job_uuid_of
from post_training.schemas import record as names
from post_training.schemas.flat import stated
from post_training.schemas.requests import AnyTrainingRequest
from post_training.uris import without_secrets


def new_run(
    request: AnyTrainingRequest, key: TaskKey | None, further: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the arguments with which ``Tracking.create_run`` makes the run of a job.

    :param key: the job's task; None where no Airflow runs it.
    :param further: tags beside those of every job, as the versions of registered data sets that it reads.
    """
    return {
        "name": request.logger_config.get("run_name") or request.job_uuid,
        "experiment": request.logger_config.get("experiment_name"),
        "tags": run_tags(request, key) | dict(further or {}),
        "params": run_params(request),
        "request": _without_keys(request.model_dump(mode="json")),
    }


def run_tags(request: AnyTrainingRequest, key: TaskKey | None) -> dict[str, str]:
    """Return the run's tags; the caller's own come first, so that they cannot replace ours."""
    return {
        **request.logger_config.get("tags", {}),
        **({names.TAG_JOB_UUID: request.job_uuid} if key is None else identity_tags(key)),
        names.TAG_PAYLOAD_HASH: request.payload_hash(),
        names.TAG_METHOD: request.method,
    }


def identity_tags(key: TaskKey) -> dict[str, str]:
    """Return the tags that say which task's job a run is of."""
    return {
        names.TAG_JOB_UUID: job_uuid_of(key),
        names.TAG_DAG_ID: key.dag_id,
        names.TAG_RUN_ID: key.run_id,
        names.TAG_TASK_ID: key.task_id,
        names.TAG_MAP_INDEX: str(key.map_index),
    }


def task_key(tags: Mapping[str, str]) -> TaskKey | None:
    """Return the task that a run's tags lead to, None where they name none."""
    try:
        return TaskKey(
            tags[names.TAG_DAG_ID],
            tags[names.TAG_RUN_ID],
            tags[names.TAG_TASK_ID],
            int(tags[names.TAG_MAP_INDEX]),
        )
    except (KeyError, ValueError):  # whoever writes to MLflow may have written them
        return None


def run_params(request: AnyTrainingRequest) -> dict[str, Any]:
    """Return the request's set fields by dotted path; those that say nothing are left out.

    So are those that its search varies: what they come to be is written when it is known, once.
    """
    searched = request.search.space if request.search is not None else {}
    return {
        path: _shown(value) for path, value in stated(request).items() if value != {} and path not in searched
    }


def _shown(value: Any) -> Any:
    """Name a data set that was sent inside the request by its size; the rest is shown as it is."""
    if isinstance(value, str) and _holds_rows(value):
        return f"data: URI of {len(value)} characters"
    return _without_keys(value)


def _without_keys(value: Any) -> Any:
    """Cut from every address what may be a secret: nothing has checked yet that it holds none."""
    if isinstance(value, dict):
        return {name: _without_keys(item) for name, item in value.items()}
    return without_secrets(value) if isinstance(value, str) and not _holds_rows(value) else value


def _holds_rows(value: str) -> bool:
    return value.strip().lower().startswith("data:")
