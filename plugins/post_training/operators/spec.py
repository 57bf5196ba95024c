"""What an attempt hands to its trainer: everything that the request names, resolved on this worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from post_training.dataset_records import DatasetRecords
from post_training.datasets import Resolver
from post_training.record import run_params
from post_training.schemas.record import TAG_ATTEMPT, TAG_SUPERSEDES, TAG_TRAIN_DATA, TAG_VALIDATION_DATA
from post_training.schemas.requests import AnyTrainingRequest, SupervisedFineTuneRequest
from post_training.schemas.trainer import (
    CACHE_FOLDER,
    RESULT_FILE,
    SPEC_FILE,
    TrackingTarget,
    TrainerSpec,
)
from post_training.settings import load_settings
from post_training.tracking import JobRun, Tracking


def write_spec(
    request: AnyTrainingRequest, run: JobRun, work_dir: Path, ti: Any, tracking: Tracking
) -> TrainerSpec:
    """Write the trainer's instructions into the job's folder, and its params into the run.

    :param ti: the running task instance.
    :raises InvalidRequestError: if the request names what cannot be had.
    :raises RecordUnavailableError: if MLflow does not answer.
    """
    settings = load_settings()
    resolver = resolver_of(tracking)
    folder = resolver.checkpoint_dir(request) if isinstance(request, SupervisedFineTuneRequest) else None
    if folder is not None and TAG_SUPERSEDES in run.tags:
        folder = folder / run.run_id  # the copies of what it supersedes stay
    tracking.add_params(run.run_id, run_params(request))
    pins = _pins(resolver, request, run, tracking)
    spec = TrainerSpec(
        request=request,
        model=resolver.model(request),
        model_roots=resolver.model_roots(),
        train_data=pins.get(TAG_TRAIN_DATA) or resolver.train_data(request),
        validation_data=pins.get(TAG_VALIDATION_DATA) or resolver.validation_data(request),
        checkpoint_dir=folder,
        work_dir=work_dir,
        attempt=ti.try_number,
        attempt_id=str(ti.id),
        begun=ti.try_number > 1 or TAG_ATTEMPT in run.tags,
        keep_state_in_mlflow=settings.keep_state_in_mlflow,
        max_data_bytes=settings.max_data_bytes,
        cache_dir=settings.home / CACHE_FOLDER,
        max_cache_bytes=settings.max_cache_bytes,
        node_patience=settings.ray_patience,
        tracking=TrackingTarget(tracking_uri=tracking.server.uri, run_id=run.run_id),
    )
    draft = work_dir / f"{SPEC_FILE}.tmp"
    draft.write_text(spec.model_dump_json(indent=2), encoding="utf-8")
    draft.replace(work_dir / SPEC_FILE)  # without it nobody would know whose state the folder holds
    (work_dir / RESULT_FILE).unlink(missing_ok=True)
    return spec


def resolver_of(tracking: Tracking) -> Resolver:
    """Return what resolves the names of data and models on this worker."""
    return Resolver(load_settings(), registered=DatasetRecords(lambda: tracking).uri)


def run_of(work_dir: Path) -> str | None:
    """Return the MLflow run that a job's folder was used for last; None where it was for none."""
    try:
        spec = TrainerSpec.model_validate_json((work_dir / SPEC_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return spec.tracking.run_id if spec.tracking is not None else None


def _pins(resolver: Resolver, request: AnyTrainingRequest, run: JobRun, tracking: Tracking) -> dict[str, str]:
    """Return the versions that the job reads: those in its run, or the current ones, from here on."""
    pinned = resolver.checked_pins(run.tags)
    if pinned:
        return pinned
    current = resolver.pins(request)
    if current:
        tracking.set_tags(run.run_id, current)
    return current
