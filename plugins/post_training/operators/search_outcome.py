"""What becomes of a search's trials: the job's run shows them all, and takes the best."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from post_training.operators.search_task import tracked
from post_training.operators.worker import PermanentFailureError
from post_training.record import run_params
from post_training.schemas import record as names
from post_training.schemas.jobs import checkpoint_identifier
from post_training.schemas.requests import AnyTrainingRequest
from post_training.schemas.search_rules import with_values
from post_training.schemas.trainer import TrainerResult
from post_training.search import Search, Trial
from post_training.search_pictures import draw
from post_training.stage_runs import StageRuns
from post_training.tracking import JobRun, Tracking

TABLE_FILE = f"{names.ARTIFACT_SEARCH}/trials.json"
TAGS_AT_ONCE = 100
GONE = "Its worker ended before it did."

COSTS = frozenset({names.METRIC_DEVICE_SECONDS, names.METRIC_JOB_TOKENS})
"""Metrics of a job that has trained itself; its trials' are added up under names of their own."""


@dataclass(frozen=True)
class Best:
    """The trial that the job takes.

    :param request: the job's, with the trial's values and without a search.
    """

    trial: Trial
    request: AnyTrainingRequest
    run: JobRun


class SearchOutcome:
    """Reads a study whose workers have ended. Every method raises RecordUnavailableError when MLflow, or the
    search's storage, fails, and may then be called again.

    :param request: the job's.
    :param search: its study.
    """

    def __init__(self, request: AnyTrainingRequest, search: Search, tracking: Tracking) -> None:
        self._request = request
        self._search = search
        self._tracking = tracking
        self._runs = StageRuns(tracking)

    def conclude(self, job: JobRun) -> Best:
        """Write into the job's run what was tried, and what it takes of it.

        A search of which workers failed before all was tried says so in a warning.

        An attempt before may have chosen: it is the same trial then.

        :raises PermanentFailureError: if no trial was finished.
        """
        self._end_left_trials()
        trials = self._search.trials()
        if not self._search.spent():
            warning = (
                f"Only {len(trials)} of {self._search.config.n_trials} trials were run: workers failed before"
                " the others; their log says why."
            )
            self._tracking.set_tags(job.run_id, {names.TAG_WARNING: warning})
        self._publish(job, trials)
        chosen = job.tags.get(names.TAG_BEST_TRIAL)
        trial = self._search.trial(int(chosen)) if chosen is not None else self._search.best()
        if trial is None:
            raise PermanentFailureError(_why_none(trials))
        run = tracked(self._tracking, trial.run_id or "")
        request = with_values(self._request, trial.values)
        tags = {names.TAG_BEST_TRIAL: str(trial.number), names.TAG_BEST_RUN: run.run_id}
        self._tracking.set_tags(job.run_id, tags)
        self._tracking.add_params(job.run_id, run_params(request))
        return Best(trial, request, run)

    def adopt(self, job: JobRun, best: Best) -> TrainerResult:
        """Let the trial's checkpoints and metrics be the job's; return them as a training's result.

        :raises PermanentFailureError: if somebody has deleted its checkpoints.
        """
        job_uuid = self._request.job_uuid
        checkpoints = [
            checkpoint.model_copy(
                update={
                    "identifier": checkpoint_identifier(job_uuid, checkpoint.epoch),
                    "post_training_job_id": job_uuid,
                }
            )
            for checkpoint in self._tracking.checkpoints(best.run)
        ]
        if not checkpoints:
            raise PermanentFailureError(f"The best trial, {best.trial.number}, has no checkpoint in MLflow.")
        resources = json.loads(best.run.tags.get(names.TAG_RESOURCES, "{}")) | self._used()
        tags = {
            f"{names.TAG_CHECKPOINT_COPY_PREFIX}{checkpoint.epoch}": checkpoint.model_dump_json()
            for checkpoint in checkpoints
        }
        self._set_tags(job, tags | {names.TAG_RESOURCES: json.dumps(resources)})
        metrics = {name: value for name, value in best.run.metrics.items() if name not in COSTS}
        self._runs.log_metrics(job.run_id, metrics)
        return TrainerResult(
            status="completed", checkpoints=checkpoints, metrics=dict(metrics), resources=resources
        )

    def _set_tags(self, job: JobRun, tags: dict[str, str]) -> None:
        """Write tags in pages: MLflow takes a hundred at once."""
        pending = list(tags.items())
        while pending:
            self._tracking.set_tags(job.run_id, dict(pending[:TAGS_AT_ONCE]))
            del pending[:TAGS_AT_ONCE]

    def _end_left_trials(self) -> None:
        """Fail the trials whose workers failed for good."""
        for trial in self._search.trials():
            if trial.state == "RUNNING" and trial.run_id and self._tracking.get(trial.run_id) is not None:
                self._tracking.set_tags(trial.run_id, {names.TAG_TRIAL_STATE: "failed"})
                self._tracking.set_status(trial.run_id, "FAILED", error=GONE)
        self._search.close(GONE)

    def _used(self) -> dict[str, float]:
        """Add up what the trials used."""
        ids = [trial.run_id for trial in self._search.trials() if trial.run_id]
        return used(map(self._tracking.get, ids))

    def _publish(self, job: JobRun, trials: list[Trial]) -> None:
        """Write the table of trials, Optuna's pictures, and what all of it has used."""
        fields = list(self._search.config.space)
        columns = ["trial", "state", self._search.config.metric, *fields, "mlflow_run_id", "error"]
        rows: list[list[Any]] = [
            [
                trial.number,
                trial.state.lower(),
                trial.value,
                *(trial.values.get(path) for path in fields),
                trial.run_id,
                trial.error,
            ]
            for trial in trials
        ]
        self._runs.log_table(job.run_id, TABLE_FILE, columns, rows)
        cost = self._used()
        self._runs.log_metrics(
            job.run_id,
            {
                names.METRIC_SEARCH_SECONDS: cost["device_seconds"],
                names.METRIC_SEARCH_TOKENS: cost["job_tokens"],
            },
        )
        with TemporaryDirectory() as folder:
            for file in draw(self._search, Path(folder)):
                self._tracking.add_file(job.run_id, file, names.ARTIFACT_SEARCH)


def used(runs: Iterable[JobRun | None]) -> dict[str, float]:
    """Add up what trials used: seconds on a device, and tokens."""
    each = [json.loads(run.tags.get(names.TAG_RESOURCES, "{}")) for run in runs if run is not None]
    of_one = {"device_seconds": "seconds", "job_tokens": "tokens"}  # where one attempt alone was counted
    return {
        name: sum(float(one.get(name, one.get(alone, 0))) for one in each) for name, alone in of_one.items()
    }


def _why_none(trials: list[Trial]) -> str:
    """Say why there is no best trial."""
    if not trials:
        return (
            "The search has tried nothing: its workers failed before their first trial; their log says why."
        )
    error = next((trial.error for trial in reversed(trials) if trial.error), None)
    return f"None of the search's {len(trials)} trials was finished: {error or 'all were pruned.'}"
