"""The record of a training that no Airflow runs: a run in MLflow, or the job's folder alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from post_training.dataset_records import DatasetRecords
from post_training.errors import InvalidRequestError, JobConflictError, RecordUnavailableError
from post_training.record import new_run
from post_training.schemas import record as names
from post_training.schemas.requests import AnyTrainingRequest
from post_training.schemas.trainer import TrackingTarget, TrainerSpec
from post_training.tracking import Tracking, TrackingServer

OF_MLFLOW = ("experiment_name", "run_name", "tags")
"""What in ``logger_config`` is said of a run in MLflow."""


class RunRecord(Protocol):
    """Where a training is recorded beside its folder."""

    @property
    def uri(self) -> str | None:
        """The tracking URI; None is the folder alone."""

    @property
    def registered(self) -> Callable[[str, str | None], str | None] | None:
        """Finds registered data sets, as ``datasets.Resolver`` wants it; None where there are none."""

    def check(self, request: AnyTrainingRequest) -> None:
        """Refuse what this record cannot hold.

        :raises InvalidRequestError: naming the field.
        """

    def make(self, request: AnyTrainingRequest, pins: Mapping[str, str]) -> TrackingTarget | None:
        """Make the training's run.

        :param pins: tags that name the versions of registered data that it reads.
        :raises RecordUnavailableError: if MLflow does not answer.
        """

    def begin(self, spec: TrainerSpec) -> None:
        """Say that an attempt begins.

        :raises JobConflictError: if somebody has deleted the run.
        :raises RecordUnavailableError: if MLflow does not answer.
        """

    def end(self, spec: TrainerSpec, status: str, error: str | None = None, log: Path | None = None) -> None:
        """Say how it ended; what MLflow does not take is told, and said again by the next attempt.

        :param status: FINISHED, FAILED or KILLED.
        :param log: the attempt's output.
        """

    def url(self, spec: TrainerSpec) -> str | None:
        """Return the address of the run's page."""


class FolderRecord:
    """The job's folder is the record: the trainer writes it."""

    uri = None
    registered = None

    def check(self, request: AnyTrainingRequest) -> None:
        """Refuse names that only MLflow knows."""
        for name in OF_MLFLOW:
            if name in request.logger_config:
                raise InvalidRequestError.of(
                    f"logger_config.{name}", "needs MLflow: give --tracking-uri or MLFLOW_TRACKING_URI"
                )

    def make(self, request: AnyTrainingRequest, pins: Mapping[str, str]) -> None:
        """Make nothing."""

    def begin(self, spec: TrainerSpec) -> None:
        """Say nothing."""

    def end(self, spec: TrainerSpec, status: str, error: str | None = None, log: Path | None = None) -> None:
        """Say nothing: the result's file does."""

    def url(self, spec: TrainerSpec) -> None:
        """Return none."""


class MLflowRunRecord:
    """A run in MLflow, as a deployment's job has one, that belongs to no Airflow.

    :param tracking: the server.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    @property
    def uri(self) -> str:
        """The tracking URI."""
        return self._tracking.server.uri

    @property
    def registered(self) -> Callable[[str, str | None], str | None]:
        """Finds data sets that are registered in the same MLflow."""
        return DatasetRecords(lambda: self._tracking).uri

    def check(self, request: AnyTrainingRequest) -> None:
        """Refuse nothing."""

    def make(self, request: AnyTrainingRequest, pins: Mapping[str, str]) -> TrackingTarget:
        """Make the training's run."""
        run = self._tracking.create_run(**new_run(request, None, pins))
        return TrackingTarget(tracking_uri=self.uri, run_id=run.run_id)

    def begin(self, spec: TrainerSpec) -> None:
        """Set the run to RUNNING, and count the attempt."""
        run_id = _run_of(spec)
        if self._tracking.get(run_id) is None:
            raise JobConflictError(
                f"{spec.work_dir} belongs to MLflow run {run_id}, which is deleted: choose another --work-dir"
            )
        self._tracking.set_status(run_id, "RUNNING")
        self._tracking.set_tags(run_id, {names.TAG_ATTEMPT: str(spec.attempt)})

    def end(self, spec: TrainerSpec, status: str, error: str | None = None, log: Path | None = None) -> None:
        """Set the run's status, and keep the attempt's log among its artifacts."""
        run_id = _run_of(spec)
        if log is not None and log.exists():
            _told(lambda: self._tracking.add_file(run_id, log, names.ARTIFACT_LOGS))
        _told(lambda: self._conclude(run_id, status, error))

    def _conclude(self, run_id: str, status: str, error: str | None) -> None:
        run = self._tracking.get(run_id)
        if run is not None and run.status != status:  # one that has ended keeps the time of its end
            self._tracking.set_status(run_id, status, error=error)

    def url(self, spec: TrainerSpec) -> str | None:
        """Return the address of the run's page; a store that is no server, or is away, has none."""
        if not self.uri.startswith("http"):
            return None
        try:
            run = self._tracking.get(_run_of(spec))
        except RecordUnavailableError:
            return None
        return None if run is None else self._tracking.server.run_url(run.experiment_id, run.run_id)


def record_at(uri: str | None, experiment: str | None) -> RunRecord:
    """Return the record at a tracking URI; of none, the folder's alone.

    :param experiment: MLflow experiment of requests that name none; None is ``post-training``.
    :raises InvalidRequestError: if the URI holds a login, which the record would show, or is missing.
    """
    if not uri:
        if experiment is not None:
            raise InvalidRequestError.of(
                "--experiment",
                f"or MLFLOW_EXPERIMENT_NAME needs a tracking URI, got {experiment!r} without one",
            )
        return FolderRecord()
    if "@" in uri:
        raise InvalidRequestError.of(
            "--tracking-uri",
            "must hold no login: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are its place",
        )
    server = TrackingServer(
        uri=uri.rstrip("/"),
        experiment=experiment or TrackingServer.experiment,
        deployment=names.NO_DEPLOYMENT,
        roots=(Path("/"),),  # what is written there is written with the user's own rights
    )
    return MLflowRunRecord(Tracking(server))


def _run_of(spec: TrainerSpec) -> str:
    assert spec.tracking is not None  # noqa: S101
    return spec.tracking.run_id


def _told(call: Callable[[], None]) -> None:
    try:
        call()
    except RecordUnavailableError as error:
        print(f"warning: {error}: the run's end is not recorded; run again to record it", file=sys.stderr)
