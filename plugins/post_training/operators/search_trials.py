"""The operator that runs the trials of a search."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from post_training.datasets import PINNED
from post_training.errors import (
    InvalidRequestError,
    PostTrainingError,
    RecordUnavailableError,
    SupersededError,
    TrainerError,
)
from post_training.job_lock import claim, locked, note_holder
from post_training.launch.local import trainer_of
from post_training.launch.results import read_result
from post_training.operators.hooks import PostTrainingHook
from post_training.operators.request import with_runtime_defaults
from post_training.operators.search_task import SearchOperator, search_of
from post_training.operators.spec import run_of, write_spec
from post_training.operators.trial_progress import Pruning, TrialProgress
from post_training.operators.worker import PermanentFailureError, task_key, work_dir_of
from post_training.schemas import record as names
from post_training.schemas.requests import AnyTrainingRequest, error_details
from post_training.schemas.rules import OF_A_CLUSTER, unsupported_here
from post_training.schemas.search_rules import with_values
from post_training.schemas.trainer import SPEC_FILE, TrainerResult, TrainerSpec
from post_training.search import ATTEMPTS, DATA, RUN, Search, Trial
from post_training.settings import load_settings
from post_training.stage_runs import StageRuns
from post_training.tracking import JobRun

if TYPE_CHECKING:
    from airflow.sdk import Context


MAX_ATTEMPTS = 3
"""How often a trial's trainer may end without a word before the trial has failed."""

OTHER_DATA = (
    "Its data is not that of the trials before, with which it cannot be compared: a new job searches anew."
)


@dataclass(frozen=True)
class _Begun:
    """A trial on its way."""

    search: Search
    trial: Trial
    run: JobRun
    folder: Path
    ti: Any

    def again(self) -> _Begun:
        """Return the same after a first attempt."""
        tags = {**self.run.tags, names.TAG_ATTEMPT: str(self.ti.try_number)}
        return replace(self, run=replace(self.run, tags=tags))


class SearchTrialsOperator(SearchOperator):
    """Run trials one after the other until the search has no more; mapped tasks do so side by side.

    Each trial is a run of its own below the job's, in MLflow. One that was cut off goes on in the next
    attempt at the same task.

    :param worker: number of this one among the mapped tasks.
    """

    template_fields: Sequence[str] = (*SearchOperator.template_fields, "worker")

    def __init__(self, *, worker: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.worker = worker

    def work(self, context: Context) -> list[int]:
        """Run trials; return the numbers of those that this attempt has ended.

        :raises PostTrainingError: if the next attempt is to go on.
        """
        request = self.build_request(self.job_key(context))
        if request.search is None:
            return []
        search = self.persist(search_of(request).open)
        job = self.persist(lambda: self.job_run(context))
        if job is None:
            raise PermanentFailureError("The job has no run in MLflow: somebody has deleted it.")
        self._lead_to_job(job, context)
        ended = []
        while (trial := self.persist(lambda: search.next_trial(int(self.worker)))) is not None:
            self.log.info("Trial %d: %s", trial.number, trial.values)
            self._run_trial(search, trial, request, job, context)
            ended.append(trial.number)
        return ended

    def _run_trial(
        self, search: Search, trial: Trial, request: AnyTrainingRequest, job: JobRun, context: Context
    ) -> None:
        """Run a trial to its end, or go on with it, and tell the study and its run how it ended.

        :raises PostTrainingError: if it is to go on in the next attempt.
        """
        folder = work_dir_of(task_key(context)) / f"trial-{trial.number}"
        claim(folder, str(context["ti"].id))
        run = self.persist(lambda: self._open_run(search, trial, request, job, context))
        self.persist(lambda: search.note(trial, **{RUN: run.run_id}))
        begun = _Begun(search, trial, run, folder, context["ti"])
        try:
            with locked(folder, give_up=lambda: self._stopped) as lock:
                state = self._ended_before(begun)
                state = state or self._train(begun, self._request_of(trial, request), lock)
        except InvalidRequestError as error:
            state = self._failed(begun, str(error))
        except SupersededError:
            raise
        except PostTrainingError:
            self._leave(run)
            raise
        self.log.info("Trial %d: %s", trial.number, state)
        shutil.rmtree(folder, ignore_errors=True)

    def _open_run(
        self, search: Search, trial: Trial, request: AnyTrainingRequest, job: JobRun, context: Context
    ) -> JobRun:
        """Return the trial's run, the one of an attempt before or a new one, as it was before this one.

        :raises SupersededError: if a newer attempt has begun.
        """
        name = request.logger_config.get("run_name") or request.job_uuid
        key, part = task_key(context), f"{search.id}/{trial.number}"
        before = StageRuns(self.tracking).find(key, part)
        _check_newest(before, context["ti"])
        if before is not None and before.tags.get(names.TAG_TRIAL_STATE, "running") != "running":
            return before  # it has ended, which the study does not know yet
        run = StageRuns(self.tracking).open(
            key,
            experiment=request.logger_config.get("experiment_name"),
            parent=job.run_id,
            name=f"{name} trial {trial.number}",
            part=part,
            further={
                **request.logger_config.get("tags", {}),
                **{tag: job.tags[tag] for tag in PINNED if tag in job.tags},
                names.TAG_TRIAL: str(trial.number),
            },
        )
        tags = {
            names.TAG_TRIAL_STATE: "running",
            names.TAG_ATTEMPT: str(context["ti"].try_number),
            names.TAG_ATTEMPT_ID: str(context["ti"].id),
            names.TAG_AIRFLOW_URL: context["ti"].log_url,
        }
        self.tracking.set_tags(run.run_id, tags)
        return run

    def _ended_before(self, begun: _Begun) -> str | None:
        """End a trial in the study whose run an attempt before has ended; return how, None for another."""
        tags = begun.run.tags
        state = tags.get(names.TAG_TRIAL_STATE, "running")
        if state == "complete":
            return self._completed(begun, begun.run.metrics.get(begun.search.config.metric))
        if state == "pruned":
            return self._pruned(begun)
        if state == "failed":
            return self._failed(begun, tags.get(names.TAG_ERROR, "The trainer failed without a reason."))
        return None

    def _request_of(self, trial: Trial, request: AnyTrainingRequest) -> AnyTrainingRequest:
        """Return the request of a trial.

        Where its values are trained anew, of the trial's own checkpoints the last one is enough.

        :raises InvalidRequestError: if its values do not go together.
        """
        assert request.search is not None  # noqa: S101
        values = dict(trial.values)
        if request.search.use == "retrain":
            values["logger_config.log_model"] = True
            if "checkpoint_dir" in type(request).model_fields:
                values["checkpoint_dir"] = None
        try:
            built = with_values(request, values)
        except ValidationError as error:
            raise InvalidRequestError(error_details(error.errors())) from None
        if problems := unsupported_here(built):
            raise InvalidRequestError(problems)
        conn_id = self.post_training_conn_id or load_settings().post_training_conn_id
        defaults = PostTrainingHook(conn_id).runtime_defaults()
        here = {name: value for name, value in defaults.items() if name not in OF_A_CLUSTER}
        return with_runtime_defaults(built, here)

    def _train(self, begun: _Begun, request: AnyTrainingRequest, lock: int) -> str:
        """Train, again where the trainer ended without a word; return how the trial ended.

        :raises PostTrainingError: if it was stopped.
        """
        search, trial, folder = begun.search, begun.trial, begun.folder
        n_epochs = request.training_config.n_epochs
        progress = TrialProgress(folder, search.config.metric, n_epochs)
        pruning = Pruning(search, trial, progress, n_epochs)
        if run_of(folder) != begun.run.run_id:  # what lies there is of another trial
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            result, error = self._train_once(begun, request, lock, pruning)
            _check_newest(self.persist(self.tracking.get, begun.run.run_id), begun.ti)
            self.persist(pruning.report)
            self.persist(lambda: search.note(trial, **{DATA: progress.data}))
            if result is not None and result.status == "completed":
                if self.persist(search.data) not in (None, progress.data):
                    return self._failed(begun, OTHER_DATA)
                return self._completed(begun, result.metrics.get(search.config.metric))
            if pruning.wanted:
                return self._pruned(begun)
            attempts = int(trial.attributes.get(ATTEMPTS, 0)) + 1
            self.persist(partial(search.note, trial, **{ATTEMPTS: attempts}))
            permanent = result is not None and (result.permanent or result.status == "inputs_changed")
            if permanent or attempts >= MAX_ATTEMPTS:
                return self._failed(begun, error)
            self.log.warning("Trial %d goes on: %s", trial.number, error)
            begun = begun.again()

    def _train_once(
        self, begun: _Begun, request: AnyTrainingRequest, lock: int, pruning: Pruning
    ) -> tuple[TrainerResult | None, str]:
        """Run the trainer to its end; return its result, if it left one, and why it is not completed.

        :param lock: file descriptor by which the trainer holds its folder's lock.
        :raises TrainerError: if it was stopped.
        """
        folder = begun.folder
        spec = self._write_spec(begun, request)
        log_file = folder / f"train-{spec.attempt}.log"
        try:
            code = self._run_process(
                trainer_of(spec.request.devices),
                folder / SPEC_FILE,
                log_file,
                pass_fds=(lock,),
                started=lambda pid: note_holder(folder, pid),
                watch=pruning,
            )
            result = read_result(spec, code)
        except TrainerError as failure:
            if self._stopped:
                raise
            return None, str(failure)
        finally:
            self._keep_log(begun.run, log_file)
        return result, result.error or "The trainer failed without a reason."

    def _write_spec(self, begun: _Begun, request: AnyTrainingRequest) -> TrainerSpec:
        """Write what the trainer is told.

        :raises TrainerError: if something is away that was there when the search was planned.
        """
        try:
            return self.persist(lambda: write_spec(request, begun.run, begun.folder, begun.ti, self.tracking))
        except InvalidRequestError as error:
            raise TrainerError(str(error)) from None

    def _completed(self, begun: _Begun, value: float | None) -> str:
        """End the run first: a trial that has ended in the study is not looked at again.

        :param value: of the metric.
        """
        search, trial = begun.search, begun.trial
        self._end_run(begun.run, "FINISHED", "complete")
        if not self.persist(lambda: search.complete(trial, value)):
            self._end_run(begun.run, "FAILED", "failed", trial.error)
            return f"failed: {trial.error}"
        return "complete"

    def _pruned(self, begun: _Begun) -> str:
        self._end_run(begun.run, "KILLED", "pruned")
        self.persist(lambda: begun.search.prune(begun.trial))
        return "pruned"

    def _failed(self, begun: _Begun, error: str) -> str:
        self._end_run(begun.run, "FAILED", "failed", error)
        self.persist(lambda: begun.search.fail(begun.trial, error))
        return f"failed: {error}"

    def _end_run(self, run: JobRun, status: str, state: str, error: str | None = None) -> None:
        self.persist(lambda: self.tracking.set_tags(run.run_id, {names.TAG_TRIAL_STATE: state}))
        self.persist(lambda: self.tracking.forget_state(run.run_id))
        self.persist(lambda: self.tracking.set_status(run.run_id, status, error=error))

    def _leave(self, run: JobRun) -> None:
        """End the run of a trial that was cut off; the next attempt may go on in it."""
        try:
            self.tracking.set_status(run.run_id, "KILLED")
        except RecordUnavailableError as unavailable:
            self.log.warning("MLflow run %s is left open: %s", run.run_id, unavailable)

    def _keep_log(self, run: JobRun, log_file: Path) -> None:
        if log_file.exists():
            try:
                self.tracking.add_file(run.run_id, log_file, names.ARTIFACT_LOGS)
            except RecordUnavailableError as unavailable:
                self.log.warning("The trial's log is not in MLflow: %s", unavailable)


def _check_newest(run: JobRun | None, ti: Any) -> None:
    """Refuse to go on with a trial that a newer attempt has taken over.

    :param run: the trial's as it is now, None where it has none yet.
    :raises SupersededError: if one has.
    """
    if run is not None and run.tags.get(names.TAG_ATTEMPT_ID, "") > str(ti.id):
        raise SupersededError("A newer attempt at this trial runs.")
