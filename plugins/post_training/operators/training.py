"""The operators that train: one task is one job, one MLflow run and one trainer process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from pydantic import ValidationError

from post_training.datasets import Resolver
from post_training.errors import InvalidRequestError, PostTrainingError, RecordUnavailableError, TrainerError
from post_training.job_ids import TaskKey, job_uuid_of
from post_training.launch.local import trainer_argv, trainer_environment
from post_training.launch.process import TrainerProcess
from post_training.operators.hooks import MLflowHook, PostTrainingHook
from post_training.operators.links import MLflowRunLink
from post_training.operators.params import FORM_DEFAULTS
from post_training.record import identity_tags, run_params, run_tags
from post_training.schemas import record as names
from post_training.schemas.flat import unflatten
from post_training.schemas.requests import (
    REQUESTS,
    AnyTrainingRequest,
    SupervisedFineTuneRequest,
    error_details,
    unsupported,
)
from post_training.schemas.trainer import RESULT_FILE, SPEC_FILE, TrackingTarget, TrainerResult, TrainerSpec
from post_training.schemas.training import RuntimeConfig
from post_training.settings import load_settings
from post_training.tracking import JobRun, Tracking

if TYPE_CHECKING:
    from airflow.sdk import Context


class TrainingOperator(BaseOperator):
    """What both training operators share: validate, record, launch, follow, conclude.

    :param request: the whole request, nested or with dotted keys, or a JSON string of it; given instead of
        single fields.
    :param training_config: the training loop and its data (``TrainingConfig``).
    :param algorithm_config: the algorithm's parameters.
    :param hyperparam_search_config: search space and budget.
    :param logger_config: MLflow names and intervals.
    :param runtime: limits; what it leaves open comes from the ``post_training`` connection.
    :param mlflow_conn_id: connection of the tracking server; None is the deployment's setting.
    :param post_training_conn_id: connection with the defaults of ``runtime``; None is the setting.
    """

    method: ClassVar[str]
    template_fields: Sequence[str] = (
        "request",
        "training_config",
        "algorithm_config",
        "hyperparam_search_config",
        "logger_config",
        "runtime",
    )
    template_fields_renderers: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "request",
            "training_config",
            "algorithm_config",
            "hyperparam_search_config",
            "logger_config",
            "runtime",
        ),
        "json",
    )
    operator_extra_links = (MLflowRunLink(),)
    ui_color = "#e8f4ea"

    def __init__(
        self,
        *,
        request: Mapping[str, Any] | str | None = None,
        training_config: Mapping[str, Any] | str | None = None,
        algorithm_config: Mapping[str, Any] | str | None = None,
        hyperparam_search_config: Mapping[str, Any] | None = None,
        logger_config: Mapping[str, Any] | None = None,
        runtime: Mapping[str, Any] | None = None,
        mlflow_conn_id: str | None = None,
        post_training_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("pool", load_settings().pool)
        super().__init__(**kwargs)
        self.request = request
        self.training_config = training_config
        self.algorithm_config = algorithm_config
        self.hyperparam_search_config = hyperparam_search_config
        self.logger_config = logger_config
        self.runtime = runtime
        self.mlflow_conn_id = mlflow_conn_id
        self.post_training_conn_id = post_training_conn_id
        self.mlflow_run_url: str | None = None
        self._process: TrainerProcess | None = None
        self._stopped = False

    @cached_property
    def tracking(self) -> Tracking:
        """The tracking server that holds the job's record."""
        return MLflowHook(self.mlflow_conn_id or load_settings().mlflow_conn_id).get_conn()

    def execute(self, context: Context) -> dict[str, Any]:
        """Train, and return the job's id, its MLflow run, its checkpoints and last metrics.

        :raises AirflowFailException: if another attempt would fail the same way.
        :raises AirflowException: if it may succeed.
        """
        key = _task_key(context)
        run: JobRun | None = None
        try:
            request = self.build_request(key)
            run = self._open_run(request, key, context)
            spec = self._write_spec(request, run, key, context["ti"].try_number)
            result = self._train(spec)
        except InvalidRequestError as error:
            self._conclude(run or self._open_refused_run(key, context), "FAILED", str(error))
            raise AirflowFailException(str(error)) from None
        except PostTrainingError as error:
            if run is not None:
                self._conclude(run, "KILLED" if self._stopped else "FAILED", str(error))
            raise AirflowException(str(error)) from None
        except BaseException as error:
            if run is not None:
                self._conclude(run, "FAILED", f"The task was interrupted: {type(error).__name__}.")
            raise
        if result.status == "failed":
            sentence = result.error or "The trainer failed without a reason."
            self._conclude(run, "FAILED", sentence)
            if result.permanent:
                shutil.rmtree(spec.work_dir, ignore_errors=True)
                raise AirflowFailException(sentence)
            raise AirflowException(sentence)
        self._conclude(run, "FINISHED")
        shutil.rmtree(spec.work_dir, ignore_errors=True)
        return {
            "job_uuid": request.job_uuid,
            "mlflow_run_id": run.run_id,
            "checkpoints": [checkpoint.model_dump(mode="json") for checkpoint in result.checkpoints],
            "metrics": result.metrics,
        }

    def on_kill(self) -> None:
        """Ask the trainer to end; ``execute`` goes on, sees it end and concludes the record."""
        self._stopped = True
        if self._process is not None:
            self._process.stop()

    def request_fields(self) -> dict[str, Any]:
        """Return the request's fields as they were given to the operator."""
        return {
            "training_config": self.training_config,
            "algorithm_config": self.algorithm_config,
            "hyperparam_search_config": self.hyperparam_search_config,
            "logger_config": self.logger_config,
            "runtime": self.runtime,
        }

    def build_request(self, key: TaskKey) -> AnyTrainingRequest:
        """Validate what was given into the request of this task's job.

        :raises InvalidRequestError: naming each field, rule and value.
        """
        model = REQUESTS[self.method]
        body = self._body(model)
        job_uuid = job_uuid_of(key)
        if body.setdefault("job_uuid", job_uuid) != job_uuid:
            raise InvalidRequestError.of(
                "job_uuid", f"must be left out or be {job_uuid!r}, the id of this task's job"
            )
        # Templates render to strings unless the DAG renders native objects, so numbers may come as text.
        try:
            request = model.model_validate(body, strict=False)
        except ValidationError as error:
            raise InvalidRequestError(error_details(error.errors())) from None
        problems = unsupported(request)
        if problems:
            raise InvalidRequestError(problems)
        return request

    def _body(self, model: type[AnyTrainingRequest]) -> dict[str, Any]:
        single = {name: value for name, value in self.request_fields().items() if value is not None}
        empty: dict[str, Any] = {"hyperparam_search_config": {}, "logger_config": {}}
        if self.request is None:
            return {**empty, **single}
        if single:
            raise InvalidRequestError.of(next(iter(single)), "was given beside request: give one of them")
        given = _parsed(self.request)
        given.pop(names.CONF_MLFLOW_RUN, None)
        if any("." in name for name in given):
            given = unflatten(model, given, form_defaults=FORM_DEFAULTS[self.method])
        return {**empty, **given}

    def _open_run(self, request: AnyTrainingRequest, key: TaskKey, context: Context) -> JobRun:
        """Find the job's run or make it, and set it to RUNNING."""
        run = self._existing_run(key, context)
        if run is not None and self._is_another_training(run, request):
            self.log.info("MLflow run %s stays as it is: this is another training", run.run_id)
            self.tracking.set_tags(run.run_id, {names.TAG_JOB_UUID: f"{request.job_uuid} (superseded)"})
            shutil.rmtree(_work_dir(key), ignore_errors=True)
            run = None
        if run is None:
            run = self.tracking.create_run(
                name=request.logger_config.get("run_name") or request.job_uuid,
                experiment=request.logger_config.get("experiment_name"),
                tags=run_tags(request, key),
                params=run_params(request),
                request=request.model_dump(mode="json"),
            )
        if run.tags.get(names.TAG_CANCELLED_ATTEMPT) == str(context["ti"].try_number):
            raise TrainerError("The job was cancelled before it began.")
        self._note_run(run, context)
        self.tracking.set_status(run.run_id, "RUNNING")
        return run

    @staticmethod
    def _is_another_training(run: JobRun, request: AnyTrainingRequest) -> bool:
        """Whether the task was cleared after its job had completed, or asks for something else by now.

        What such a run holds is the record of what was trained then; only an attempt at the same may go on.
        """
        recorded = run.tags.get(names.TAG_PAYLOAD_HASH)
        return run.status == "FINISHED" or (recorded is not None and recorded != request.payload_hash())

    def _existing_run(self, key: TaskKey, context: Context) -> JobRun | None:
        """Return the run of this very task: ids are made of names, and two tasks' names may add up to one."""
        job_uuid = job_uuid_of(key)
        run_id = (context["dag_run"].conf or {}).get(names.CONF_MLFLOW_RUN)
        named = self.tracking.get(run_id) if isinstance(run_id, str) else None
        for run in (named, self.tracking.find(job_uuid)):
            if run is not None and identity_tags(key).items() <= run.tags.items():
                return run
        return None

    def _open_refused_run(self, key: TaskKey, context: Context) -> JobRun | None:
        """Find or make the run of a request that is not even valid, so that it too has a record."""
        try:
            run = self._existing_run(key, context) or self.tracking.create_run(
                name=job_uuid_of(key),
                experiment=None,
                tags={**identity_tags(key), names.TAG_METHOD: self.method},
                params={},
                request={},  # what was given is in the task's rendered fields; it may hold anything
            )
            self._note_run(run, context)
        except RecordUnavailableError as error:
            self.log.warning("The refusal could not be recorded: %s", error)
            return None
        return run

    def _note_run(self, run: JobRun, context: Context) -> None:
        ti = context["ti"]
        self.mlflow_run_url = self.tracking.server.run_url(run.experiment_id, run.run_id)
        # Airflow itself stores the link only when the task ends.
        ti.xcom_push(key=MLflowRunLink().xcom_key, value=self.mlflow_run_url)
        self.tracking.set_tags(
            run.run_id, {names.TAG_ATTEMPT: str(ti.try_number), names.TAG_AIRFLOW_URL: ti.log_url}
        )
        self.log.info("MLflow run %s: %s", run.run_id, self.mlflow_run_url)

    def _write_spec(
        self, request: AnyTrainingRequest, run: JobRun, key: TaskKey, attempt: int
    ) -> TrainerSpec:
        """Resolve what the request names and write the trainer's instructions into the job's folder."""
        assert isinstance(request, SupervisedFineTuneRequest)  # noqa: S101
        settings = load_settings()
        resolver = Resolver(settings)
        request = self._with_runtime_defaults(request)
        self.tracking.add_params(run.run_id, run_params(request))
        work_dir = _work_dir(key)
        work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        spec = TrainerSpec(
            request=request,
            model=resolver.model(request),
            train_data=resolver.train_data(request),
            validation_data=resolver.validation_data(request),
            checkpoint_dir=resolver.checkpoint_dir(request),
            work_dir=work_dir,
            attempt=attempt,
            tracking=TrackingTarget(tracking_uri=self.tracking.server.uri, run_id=run.run_id),
        )
        (work_dir / SPEC_FILE).write_text(spec.model_dump_json(indent=2), encoding="utf-8")
        (work_dir / RESULT_FILE).unlink(missing_ok=True)
        return spec

    def _with_runtime_defaults(self, request: SupervisedFineTuneRequest) -> SupervisedFineTuneRequest:
        conn_id = self.post_training_conn_id or load_settings().post_training_conn_id
        defaults = PostTrainingHook(conn_id).runtime_defaults()
        given = request.runtime.model_dump(exclude_unset=True) if request.runtime is not None else {}
        return request.model_copy(update={"runtime": RuntimeConfig.model_validate({**defaults, **given})})

    def _train(self, spec: TrainerSpec) -> TrainerResult:
        """Run the trainer to its end, its output in the task's log.

        :raises TrainerError: if it was stopped, or ended without a result.
        """
        log_file = spec.work_dir / f"train-{spec.attempt}.log"
        try:
            self._process = TrainerProcess(
                trainer_argv(load_settings().trainer_python, spec.work_dir / SPEC_FILE),
                trainer_environment(os.environ, self.tracking.server.environment()),
                log_file,
                folder=spec.work_dir,
            )
            if self._stopped:
                self._process.stop()
            for line in self._process.lines():
                self.log.info(line)
            code = self._process.exit_code()
        finally:
            if self._process is not None:
                self._process.kill()
            self._upload_log(spec, log_file)
        if self._stopped:
            raise TrainerError("The job was stopped.")
        return _read_result(spec.work_dir / RESULT_FILE, code)

    def _upload_log(self, spec: TrainerSpec, log_file: Path) -> None:
        if spec.tracking is None or not log_file.exists():
            return
        try:
            self.tracking.add_file(spec.tracking.run_id, log_file, names.ARTIFACT_LOGS)
        except RecordUnavailableError as error:
            self.log.warning("The training log could not be uploaded: %s", error)

    def _conclude(self, run: JobRun | None, status: str, error: str | None = None) -> None:
        """Write the job's end into its record; the task's own outcome does not hang on it.

        A job that was cancelled meanwhile stays so, however its trainer ended.
        """
        if run is None:
            return
        try:
            current = self.tracking.get(run.run_id)
            if current is not None and current.status == "KILLED":
                return
            self.tracking.set_status(run.run_id, status, error=error)
        except RecordUnavailableError as unavailable:
            self.log.warning("MLflow run %s could not be set to %s: %s", run.run_id, status, unavailable)


class SupervisedFineTuneOperator(TrainingOperator):
    """Fine-tune a model on given answers.

    :param model: base model: a hub id, a path under an allowed root; None is the deployment's default.
    :param checkpoint_dir: folder under an allowed root that receives a copy of each checkpoint.
    """

    method = "supervised_fine_tune"
    template_fields = (*TrainingOperator.template_fields, "model", "checkpoint_dir")

    def __init__(self, *, model: str | None = None, checkpoint_dir: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.checkpoint_dir = checkpoint_dir

    def request_fields(self) -> dict[str, Any]:
        """Return the request's fields as they were given to the operator."""
        return {**super().request_fields(), "model": self.model, "checkpoint_dir": self.checkpoint_dir}


class PreferenceOptimizeOperator(TrainingOperator):
    """Fine-tune a model on chosen and rejected answers.

    :param finetuned_model: model to start from: a hub id or a path under an allowed root.
    """

    method = "preference_optimize"
    template_fields = (*TrainingOperator.template_fields, "finetuned_model")

    def __init__(self, *, finetuned_model: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.finetuned_model = finetuned_model

    def request_fields(self) -> dict[str, Any]:
        """Return the request's fields as they were given to the operator."""
        return {**super().request_fields(), "finetuned_model": self.finetuned_model}


def _task_key(context: Context) -> TaskKey:
    ti = context["ti"]
    return TaskKey(ti.dag_id, ti.run_id, ti.task_id, ti.map_index if ti.map_index is not None else -1)


def _work_dir(key: TaskKey) -> Path:
    """Return the folder of a task's job, shared by its attempts."""
    mapped = "" if key.map_index < 0 else f".{key.map_index}"
    return load_settings().home / "jobs" / key.dag_id / key.run_id / f"{key.task_id}{mapped}"


def _parsed(given: Mapping[str, Any] | str) -> dict[str, Any]:
    """Read a request that may be a JSON string.

    :raises InvalidRequestError: if it is no object.
    """
    if not isinstance(given, str):
        return dict(given)
    try:
        value = json.loads(given)
    except json.JSONDecodeError as error:
        raise InvalidRequestError.of(
            "request",
            f"must be an object or a JSON string of one: {error}; a DAG without"
            " render_template_as_native_obj=True renders objects as Python text, use a tojson filter there",
        ) from None
    if not isinstance(value, dict):
        raise InvalidRequestError.of("request", f"must be an object, got {type(value).__name__}")
    return value


def _read_result(path: Path, code: int) -> TrainerResult:
    """Return the trainer's result.

    :raises TrainerError: if it left none.
    """
    if path.exists():
        return TrainerResult.model_validate_json(path.read_text(encoding="utf-8"))
    if code < 0:
        raise TrainerError(f"The trainer was killed by signal {-code}; out of memory is a usual cause.")
    raise TrainerError(f"The trainer ended with exit code {code} and no result.")
