"""The command that trains here: the deployment's trainer and record, without Airflow."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from post_training.cli.exits import ExitCode
from post_training.cli.output import print_checkpoints, print_fields, print_json, rounded
from post_training.cli.request_file import method_of, read_body
from post_training.cli.run_record import RunRecord, record_at
from post_training.cli.trainer import run_trainer
from post_training.datasets import Resolver
from post_training.errors import InvalidRequestError, JobConflictError, TrainerError
from post_training.get_provider_info import OPTIONS
from post_training.job_lock import locked
from post_training.launch.results import read_result
from post_training.schemas.record import (
    METRIC_TRAIN_LOSS,
    METRIC_VALIDATION_LOSS,
    TAG_TRAIN_DATA,
    TAG_VALIDATION_DATA,
)
from post_training.schemas.requests import AnyTrainingRequest, SupervisedFineTuneRequest, error_details
from post_training.schemas.rlhf import read_request
from post_training.schemas.rules import unsupported_here
from post_training.schemas.trainer import (
    CACHE_FOLDER,
    RESULT_FILE,
    RESUME_FOLDER,
    SPEC_FILE,
    TrainerResult,
    TrainerSpec,
)

RUNS_FOLDER = "post_training_runs"
"""Below the current folder: the folders of jobs that name none."""

LOCK_SECONDS = 5.0
"""A trainer whose parent was killed is gone by then."""

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Anything:
    """What may be named by who trains here: all that they may read, relative names from a folder on."""

    allowed_roots: tuple[Path, ...]
    default_model: None = None
    max_data_uri_bytes: int = int(OPTIONS["max_data_uri_bytes"][1])


def run(
    file: Path,
    *,
    job_uuid: str | None,
    work_dir: Path | None,
    tracking_uri: str | None,
    experiment: str | None,
    as_json: bool,
) -> ExitCode:
    """Train what a file asks for, or go on with it, and print what came of it.

    :param job_uuid: replaces the file's; where neither names one it is the file's name.
    :param work_dir: the job's folder, by which the next call finds its state; None is one named like the job.
    :param tracking_uri: MLflow's; None records in the folder alone.
    :param experiment: MLflow experiment where the request names none.
    :raises PostTrainingError: if the request is refused, or the folder is another request's.
    """
    request = read(file, job_uuid)
    record = record_at(tracking_uri, experiment)
    record.check(request)
    folder = (work_dir or Path(RUNS_FOLDER, request.job_uuid)).resolve()
    if not folder.exists():
        _resolver(record).check(request)  # before anything is made
    with _alone_in(folder) as lock:
        spec, result = _attempt(request, folder, record, lock)
    if result is None:
        print(f"Stopped. The same command goes on from {folder}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    _report(spec, result, record, as_json=as_json)
    return ExitCode.OK if result.status == "completed" else ExitCode.FAILED


def read(file: Path, job_uuid: str | None) -> AnyTrainingRequest:
    """Return the request in a file, with all that can be checked of it alone.

    :raises InvalidRequestError: naming each field, rule and value.
    """
    body = read_body(file, job_uuid=job_uuid, default_job_uuid=file.stem)
    try:
        request = read_request(method_of(body), body)
    except ValidationError as error:
        raise InvalidRequestError(error_details(error.errors())) from None
    if problems := unsupported_here(request):
        raise InvalidRequestError(problems)
    if request.search is not None:
        raise InvalidRequestError.of(
            "hyperparam_search_config", "must be empty: trials are tasks of a deployment, submit it to one"
        )
    return request


def _attempt(
    request: AnyTrainingRequest, folder: Path, record: RunRecord, lock: int
) -> tuple[TrainerSpec, TrainerResult | None]:
    """Train, unless that has been done; the result is None where it was interrupted before there was one.

    :raises TrainerError: if the trainer ended without a result.
    :raises JobConflictError: if the folder belongs to another training.
    """
    before = _read(folder / SPEC_FILE, TrainerSpec)
    if before is None:
        spec = _first_spec(request, folder, record)
    else:
        _check_same(before, request, folder, record)
        result = _read(folder / RESULT_FILE, TrainerResult)
        if result is not None and result.status == "completed":
            record.end(before, "FINISHED")  # who was killed has not said so
            return before, result
        if result is not None and result.diverged:
            raise JobConflictError(f"the training in {folder} has failed for good: {result.error}")
        spec = before.model_copy(update={"attempt": before.attempt + 1, "begun": True})
    _write(spec)
    record.begin(spec)
    return spec, _trained(spec, record, lock)


def _first_spec(request: AnyTrainingRequest, folder: Path, record: RunRecord) -> TrainerSpec:
    """Resolve what the request names, and make its run.

    :raises InvalidRequestError: naming the field whose data or model cannot be had.
    """
    resolver = _resolver(record)
    resolver.check(request)
    pins = resolver.pins(request)
    spec = TrainerSpec(
        request=request,
        model=resolver.model(request),
        model_roots=resolver.model_roots(),
        train_data=pins.get(TAG_TRAIN_DATA) or resolver.train_data(request),
        validation_data=pins.get(TAG_VALIDATION_DATA) or resolver.validation_data(request),
        checkpoint_dir=(
            resolver.checkpoint_dir(request) if isinstance(request, SupervisedFineTuneRequest) else None
        ),
        work_dir=folder,
        attempt=1,
        keep_state_in_mlflow=False,  # it is in the folder
        tracking=None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    return spec.model_copy(update={"tracking": record.make(request, pins)})


def _resolver(record: RunRecord) -> Resolver:
    # The file system's root is one too: all is allowed, and a relative name is looked for here first.
    return Resolver(Anything((Path.cwd(), Path("/"))), registered=record.registered)


def _check_same(before: TrainerSpec, request: AnyTrainingRequest, folder: Path, record: RunRecord) -> None:
    """Refuse a folder in which something else was trained, or that is recorded elsewhere.

    :raises JobConflictError: saying which.
    """
    advice = f"choose another --work-dir, or delete {folder}"
    if before.work_dir != folder:  # files in it name others by where they were
        raise JobConflictError(f"{folder} was {before.work_dir}: move it back, or {advice}")
    if before.request.payload_hash() != request.payload_hash():
        raise JobConflictError(f"{folder} belongs to another request: {advice}")
    uri = before.tracking.tracking_uri if before.tracking is not None else None
    if uri != record.uri:
        raise JobConflictError(
            f"the training in {folder} is recorded in {uri or 'its folder alone'}, not in"
            f" {record.uri or 'its folder alone'}: {advice}"
        )


def _trained(spec: TrainerSpec, record: RunRecord, lock: int) -> TrainerResult | None:
    """Run the trainer to its end, record how it ended, and return its result; None where it was interrupted.

    :raises TrainerError: if it ended without a result.
    :raises JobConflictError: if data or model are no longer those of the attempts before.
    """
    log = spec.work_dir / f"train-{spec.attempt}.log"
    try:
        code, interrupted = run_trainer(spec, log, lock)
        result = None if interrupted and code else read_result(spec, code)
    except TrainerError as error:
        record.end(spec, "FAILED", str(error), log)
        raise
    if result is None:
        record.end(spec, "KILLED", log=log)
    elif result.status == "completed":
        record.end(spec, "FINISHED", log=log)
        for name in (RESUME_FOLDER, CACHE_FOLDER):  # nothing goes on from here
            shutil.rmtree(spec.work_dir / name, ignore_errors=True)
    else:
        record.end(spec, "FAILED", result.error, log)
        if result.status == "inputs_changed":
            raise JobConflictError(f"{result.error} Choose another --work-dir, or delete {spec.work_dir}")
    return result


@contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """Hold the folder's lock.

    :raises JobConflictError: if another process trains in it.
    """
    deadline = monotonic() + LOCK_SECONDS
    with ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locked(folder, give_up=lambda: monotonic() > deadline))
        except TrainerError:
            raise JobConflictError(f"another process trains in {folder}") from None
        yield descriptor


def _read(file: Path, model: type[_Model]) -> _Model | None:
    """Return what a file of the job's folder holds; None where there is none.

    :raises JobConflictError: if it is no file of ours.
    """
    try:
        return model.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise JobConflictError(f"{file} is not ours: choose another --work-dir, or delete it") from None


def _write(spec: TrainerSpec) -> None:
    """Write the trainer's instructions; what an attempt before has left as its result is none of this one."""
    draft = spec.work_dir / f"{SPEC_FILE}.tmp"
    draft.write_text(spec.model_dump_json(indent=2), encoding="utf-8")
    draft.replace(spec.work_dir / SPEC_FILE)
    (spec.work_dir / RESULT_FILE).unlink(missing_ok=True)


def _report(spec: TrainerSpec, result: TrainerResult, record: RunRecord, *, as_json: bool) -> None:
    """Print what came of a training."""
    places = {"work_dir": str(spec.work_dir), "mlflow_run": record.url(spec)}
    if as_json:
        print_json(
            {
                "job_uuid": spec.request.job_uuid,
                **places,
                "mlflow_run_id": spec.tracking.run_id if spec.tracking is not None else None,
                **result.model_dump(mode="json", exclude={"attempt_id"}),
            }
        )
        return
    print_fields(
        {
            "job": spec.request.job_uuid,
            "status": result.status,
            "error": result.error,
            "folder": places["work_dir"],
            "MLflow run": places["mlflow_run"],
            "train loss": rounded(result.metrics.get(METRIC_TRAIN_LOSS)),
            "validation loss": rounded(result.metrics.get(METRIC_VALIDATION_LOSS)),
        }
    )
    if result.checkpoints:
        print_checkpoints(result.checkpoints)
