"""The operators that train: one task is one job, one MLflow run and one trainer process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred

from post_training.errors import InvalidRequestError, PostTrainingError, SupersededError, TrainerError
from post_training.job_ids import TRAINING_OPERATORS, TaskKey, job_uuid_of
from post_training.job_lock import claim, locked, newest_claim, note_holder
from post_training.launch.local import trainer_of
from post_training.launch.results import read_result
from post_training.operators.hooks import PostTrainingHook
from post_training.operators.links import CheckpointLink, JobLink, MLflowRunLink
from post_training.operators.on_ray import Ended, OnRay, check_states_are_kept, ray_jobs
from post_training.operators.request import build_request, was_there, with_checked_defaults
from post_training.operators.search_outcome import SearchOutcome
from post_training.operators.search_task import search_that_ran
from post_training.operators.spec import run_of, write_spec
from post_training.operators.task_record import TaskRecord
from post_training.operators.triggers import RayJobTrigger
from post_training.operators.worker import (
    PermanentFailureError,
    WorkerOperator,
    bind_to_supervisor,
    task_key,
    work_dir_of,
)
from post_training.schemas import record as names
from post_training.schemas.jobs import Checkpoint
from post_training.schemas.requests import AnyTrainingRequest
from post_training.schemas.rlhf import PostTrainingRLHFRequest
from post_training.schemas.trainer import BASE_FOLDER, SPEC_FILE, UPLOADED, TrainerResult, TrainerSpec
from post_training.search import NoSearchError, Search
from post_training.search_parts import SearchUnavailableError
from post_training.settings import load_settings
from post_training.tracking import JobRun

if TYPE_CHECKING:
    from airflow.sdk import Context


RAY_POLL_SECONDS = 5.0
"""Between two looks at a job on a Ray cluster."""

PERMANENT = (SupersededError, PermanentFailureError, SearchUnavailableError, NoSearchError)
"""Errors that another attempt would meet again, or that end this one alone; a request's apart."""


class TrainingOperator(WorkerOperator):
    """What both training operators share: validate, record, launch, follow, conclude.

    A subclass keeps ``custom_operator_name``, by which the deployment finds the tasks that are jobs, mapped
    ones too.

    :param request: the whole request, nested or with dotted keys, or a JSON string of it; given instead of
        single fields.
    :param training_config: the training loop and its data (``TrainingConfig``).
    :param algorithm_config: the algorithm's parameters.
    :param hyperparam_search_config: search space and budget; its trials run in the tasks that
        ``search_before`` puts in front.
    :param logger_config: MLflow names and intervals.
    :param runtime: limits, and adapters of a preference or QAT job; what it leaves unset comes from the
        ``post_training`` connection, as far as it means something for this job.
    :param post_training_conn_id: connection with the defaults of ``runtime``; None is the setting.
    :param parent_run_id: MLflow run below which the job's is shown.
    """

    method: ClassVar[str]
    custom_operator_name: ClassVar[str]
    request_fields: ClassVar[tuple[str, ...]] = (
        "training_config",
        "algorithm_config",
        "hyperparam_search_config",
        "logger_config",
        "runtime",
    )
    operator_extra_links = (JobLink(), MLflowRunLink(), CheckpointLink())
    template_fields: Sequence[str] = ("request", *request_fields, "parent_run_id")
    template_fields_renderers: ClassVar[dict[str, str]] = dict.fromkeys(("request", *request_fields), "json")
    ui_color = "#e8f4ea"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class whose tasks nobody would find.

        :raises TypeError: if it has another ``custom_operator_name``, or none.
        """
        super().__init_subclass__(**kwargs)
        if getattr(cls, "custom_operator_name", None) not in TRAINING_OPERATORS:
            raise TypeError(
                f"{cls.__name__}: custom_operator_name must be one of {', '.join(TRAINING_OPERATORS)}: "
                "by it the tasks that are jobs are found"
            )

    def __init__(
        self,
        *,
        request: Mapping[str, Any] | str | None = None,
        training_config: Mapping[str, Any] | str | None = None,
        algorithm_config: Mapping[str, Any] | str | None = None,
        hyperparam_search_config: Mapping[str, Any] | None = None,
        logger_config: Mapping[str, Any] | None = None,
        runtime: Mapping[str, Any] | None = None,
        post_training_conn_id: str | None = None,
        parent_run_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.request = request
        self.training_config = training_config
        self.algorithm_config = algorithm_config
        self.hyperparam_search_config = hyperparam_search_config
        self.logger_config = logger_config
        self.runtime = runtime
        self.post_training_conn_id = post_training_conn_id
        self.parent_run_id = parent_run_id
        self._event: Mapping[str, Any] = {}  # of the trigger that has waited for a job on Ray

    def execute(self, context: Context) -> dict[str, Any]:
        """Train, and return the job's id, its MLflow run, its checkpoints and last metrics.

        :raises AirflowFailException: if another attempt would fail the same way.
        :raises AirflowException: if it may succeed.
        """
        bind_to_supervisor()
        JobLink().note(self, context["ti"])
        key, conf = task_key(context), context["dag_run"].conf or {}
        record = TaskRecord(
            self.tracking,
            key,
            context["ti"],
            conf.get(names.CONF_MLFLOW_RUN),
            self.parent_run_id,
            give_up=lambda: self._stopped,
        )
        try:
            return self._run_job(key, record)
        except InvalidRequestError as error:
            if was_there(error) and record.submitted_run_id is not None:
                record.fail(str(error))
                raise AirflowException(str(error)) from None
            record.refuse(self.method, str(error))
            raise AirflowFailException(str(error)) from None
        except PostTrainingError as error:
            permanent = isinstance(error, PERMANENT)
            if not self._stopped:  # by whom and what for, Airflow knows: the record follows its state
                permanent = permanent or record.is_cancelled()
                record.fail(str(error), permanent=permanent)
            raise (AirflowFailException if permanent else AirflowException)(str(error)) from None
        except TaskDeferred:
            raise
        except BaseException as error:
            record.fail(f"The task was interrupted: {type(error).__name__}.")
            raise
        finally:
            self.mlflow_run_url = record.url

    def execute_complete(self, context: Context, event: Mapping[str, Any]) -> dict[str, Any]:
        """Go on when the trainer's job on a Ray cluster has ended: ``execute`` finds it again.

        :param event: of the trigger; its ``error`` says why it waits no longer, ``left`` that it has stopped
            the job.
        :raises AirflowFailException: if another attempt would fail the same way.
        :raises AirflowException: if it may succeed.
        """
        if event["error"] is not None:
            self.log.warning("%s", event["error"])
        self._event = event
        return self.execute(context)

    def _run_job(self, key: TaskKey, record: TaskRecord) -> dict[str, Any]:
        """Train the task's job, or find that it has been done."""
        request = self.build_request(key)
        search = None
        if request.search is not None:
            search = record.persist(lambda: search_that_ran(request, self))
        work_dir = work_dir_of(key)
        claim(work_dir, record.attempt_id)
        opened = record.open(request)
        if record.ti.try_number > 1:  # Airflow has forgotten where the attempt before led
            self._lead_to_newest(record.persist(lambda: self.tracking.checkpoints(opened.run)), record)
        with locked(work_dir, give_up=lambda: self._stopped) as lock:
            result = None
            if opened.finished:
                self.log.info("An earlier attempt has completed the job.")
            else:
                result = self._attempt(request, search, opened.run, work_dir, record, lock)
                if result.status == "inputs_changed":
                    claim(work_dir, record.attempt_id)  # not where a newer attempt begins in the same run
                    opened = record.renew(request, _reason(result))
                    result = self._attempt(request, search, opened.run, work_dir, record, lock)
            self._clear_up(work_dir, record, result)
        if result is not None and result.status != "completed":
            raise PermanentFailureError(_reason(result))
        checkpoints = result.checkpoints if result is not None else None
        if checkpoints is None:
            checkpoints = record.persist(lambda: self.tracking.checkpoints(opened.run))
        self._lead_to_newest(checkpoints, record)
        return {
            "job_uuid": request.job_uuid,
            "mlflow_run_id": opened.run.run_id,
            "checkpoints": [checkpoint.model_dump(mode="json") for checkpoint in checkpoints],
            "metrics": result.metrics if result is not None else dict(opened.run.metrics),
        }

    def _lead_to_newest(self, checkpoints: Sequence[Checkpoint], record: TaskRecord) -> None:
        newest = max(checkpoints, key=lambda checkpoint: checkpoint.epoch, default=None)
        if newest is not None:
            self._lead_to(newest.path, record)

    def _lead_to(self, checkpoint: str, record: TaskRecord) -> None:
        """Let the task lead to a checkpoint, if MLflow has it.

        :param checkpoint: its path or URI.
        """
        assert record.run is not None  # noqa: S101
        url = self.tracking.server.checkpoint_url(record.run.experiment_id, checkpoint)
        if url is not None:
            CheckpointLink().note(self, record.ti, url)

    def _attempt(
        self,
        request: AnyTrainingRequest,
        search: Search | None,
        run: JobRun,
        work_dir: Path,
        record: TaskRecord,
        lock: int,
    ) -> TrainerResult:
        """Train, or take what a trial has trained, and conclude the record of a job that is completed.

        :raises TrainerError: if it failed, and another attempt may succeed.
        """
        if search is not None:
            outcome = SearchOutcome(request, search, self.tracking)
            best = record.persist(lambda: outcome.conclude(run))
            self.log.info("Trial %d is the best: %s", best.trial.number, best.trial.values)
            if search.config.use == "checkpoint":
                result = record.persist(lambda: outcome.adopt(run, best))
                record.conclude("FINISHED")
                return result
            request = best.request
        request = self._with_defaults(request)
        if run_of(work_dir) != run.run_id:  # what lies there is of another training
            shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(exist_ok=True, mode=0o700)
        if request.on_ray:
            result = self._train_on_ray(request, run, work_dir, record)
        else:
            if run.tags.get(names.TAG_FOLLOWED):  # a job on Ray, which stops when it sees that
                record.persist(lambda: self.tracking.set_tags(run.run_id, {names.TAG_FOLLOWED: ""}))
            spec = record.persist(lambda: write_spec(request, run, work_dir, record.ti, self.tracking))
            result = self._train(spec, record, lock)
        if result.status == "failed" and not result.permanent:
            raise TrainerError(_reason(result))
        if result.status == "completed":
            record.conclude("FINISHED")
        return result

    def _clear_up(self, work_dir: Path, record: TaskRecord, result: TrainerResult | None) -> None:
        """Delete what no later attempt will go on from.

        Where it failed for good, a disk may be away: whoever clears the task goes on from what was trained
        before. Only the copy of a base from MLflow may be what is wrong.
        """
        ours = newest_claim(work_dir) == record.attempt_id
        if result is None or result.status == "completed" or result.diverged:
            record.forget_state()
            if ours:
                shutil.rmtree(work_dir, ignore_errors=True)
        elif ours:
            shutil.rmtree(work_dir / BASE_FOLDER, ignore_errors=True)

    def build_request(self, key: TaskKey) -> AnyTrainingRequest:
        """Validate what was given into the request of this task's job.

        :raises InvalidRequestError: naming each field, rule and value.
        """
        fields = {name: getattr(self, name) for name in self.request_fields}
        return build_request(self.method, job_uuid_of(key), self.request, fields)

    def _with_defaults(self, request: AnyTrainingRequest) -> AnyTrainingRequest:
        """Return the request with the deployment's defaults.

        :raises InvalidRequestError: if they do not go together.
        """
        conn_id = self.post_training_conn_id or load_settings().post_training_conn_id
        return with_checked_defaults(request, PostTrainingHook(conn_id).runtime_defaults())

    def _train_on_ray(
        self, request: AnyTrainingRequest, run: JobRun, work_dir: Path, record: TaskRecord
    ) -> TrainerResult:
        """Read the result of the attempt's job on the Ray cluster, or leave the worker until there is one.

        :raises TaskDeferred: while it runs.
        :raises TrainerError: if it was stopped, or ended without a result.
        :raises ClusterUnavailableError: if the cluster does not answer.
        :raises InvalidRequestError: if the deployment has no cluster, or keeps no states.
        """
        # What the trigger has waited for in vain is not waited for once more.
        patience = 0.0 if self._event.get("error") else load_settings().ray_patience
        on_ray = OnRay(ray_jobs(), self.tracking, record, run, patience)
        log_file = work_dir / f"train-{record.ti.try_number}.log"

        def keep(file: Path) -> None:
            record.add_file(file, names.ARTIFACT_LOGS)

        if self._event.get("left"):
            return on_ray.leave(self._event["error"], log_file, keep)
        found = on_ray.find()
        if isinstance(found, Ended):
            return on_ray.read(found, log_file, keep)
        if found is None:
            check_states_are_kept()
            found = on_ray.submit(
                record.persist(lambda: write_spec(request, run, work_dir, record.ti, self.tracking))
            )
        if self._stopped:
            on_ray.jobs.stop(found)
            raise TrainerError("The job was stopped.")
        self.defer(
            trigger=RayJobTrigger(found, RAY_POLL_SECONDS, self._deadline(record.ti)),
            method_name="execute_complete",
        )

    def _deadline(self, ti: Any) -> float | None:
        """Return when the time limit of an attempt ends, in seconds since the epoch.

        Airflow does not apply it to a task that waits, and the limit of a trigger would not stop the job.
        """
        limit = self.execution_timeout
        return None if limit is None else (ti.start_date + limit).timestamp()

    def _train(self, spec: TrainerSpec, record: TaskRecord, lock: int) -> TrainerResult:
        """Run the trainer to its end, its output in the task's log.

        :param lock: file descriptor by which the trainer holds its folder's lock.
        :raises TrainerError: if it was stopped, or ended without a result.
        """
        log_file = spec.work_dir / f"train-{spec.attempt}.log"
        try:
            code = self._run_process(
                trainer_of(spec.request.devices),
                spec.work_dir / SPEC_FILE,
                log_file,
                pass_fds=(lock,),
                started=lambda pid: note_holder(spec.work_dir, pid),
                heard=lambda line: self._hear(line, record),
            )
        finally:
            if log_file.exists():
                record.add_file(log_file, names.ARTIFACT_LOGS)
        return read_result(spec, code)

    def _hear(self, line: str, record: TaskRecord) -> None:
        _, uploaded, uri = line.partition(UPLOADED)
        if uploaded:
            self._lead_to(uri.strip(), record)


class SupervisedFineTuneOperator(TrainingOperator):
    """Fine-tune a model on given answers.

    :param model: base model: a hub id, a path under an allowed root; None is the deployment's default.
    :param checkpoint_dir: folder under an allowed root that receives a copy of each checkpoint.
    """

    method = "supervised_fine_tune"
    custom_operator_name = "SupervisedFineTuneOperator"
    request_fields = (*TrainingOperator.request_fields, "model", "checkpoint_dir")
    template_fields = ("request", *request_fields, "parent_run_id")

    def __init__(self, *, model: str | None = None, checkpoint_dir: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.checkpoint_dir = checkpoint_dir


class PreferenceOptimizeOperator(TrainingOperator):
    """Fine-tune a model on chosen and rejected answers.

    :param finetuned_model: model to start from: a hub id, a path under an allowed root, or an MLflow URI.
    """

    method = "preference_optimize"
    custom_operator_name = "PreferenceOptimizeOperator"
    request_fields = (*TrainingOperator.request_fields, "finetuned_model")
    template_fields = ("request", *request_fields, "parent_run_id")

    def __init__(self, *, finetuned_model: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.finetuned_model = finetuned_model

    @classmethod
    def from_rlhf_request(
        cls, request: Mapping[str, Any] | str | PostTrainingRLHFRequest, **operator_kwargs: Any
    ) -> Self:
        """Make the operator of a request in the published schema's long form.

        :param request: a mapping, or a JSON string of one, may hold templates and leave out ``job_uuid``;
            one that is given must be the id of the task's job.
        :param operator_kwargs: what every operator takes, ``task_id`` and so on.
        """
        if isinstance(request, PostTrainingRLHFRequest):
            request = request.model_dump(mode="json", exclude_unset=True)
        return cls(request=request, **operator_kwargs)


def _reason(result: TrainerResult) -> str:
    return result.error or "The trainer failed without a reason."
