"""What the operators share whose task is no job: an MLflow run of its own, and how its errors are told."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowSkipException,
    DownstreamTasksSkipped,
)
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from post_training.errors import (
    DataError,
    InvalidRequestError,
    ModelError,
    PostTrainingError,
    RecordUnavailableError,
    TrainerError,
)
from post_training.job_ids import TaskKey
from post_training.launch.results import no_result
from post_training.operators.links import MLflowRunLink
from post_training.operators.worker import (
    PermanentFailureError,
    WorkerOperator,
    bind_to_supervisor,
    task_key,
)
from post_training.schemas import record as names
from post_training.schemas.base import parse_json_object
from post_training.schemas.requests import LENIENT, error_details
from post_training.schemas.trainer import ProcessResult
from post_training.stage_runs import StageRuns
from post_training.tracking import JobRun

if TYPE_CHECKING:
    from airflow.sdk import Context

Config = TypeVar("Config", bound=BaseModel)
Result = TypeVar("Result", bound=ProcessResult)


class StageOperator(WorkerOperator):
    """Does its work in an MLflow run of its own, which an attempt after it finds again.

    :param parent_run_id: MLflow run below which it is shown.
    :param experiment_name: MLflow experiment; None is the connection's.
    """

    def __init__(
        self, *, parent_run_id: str | None = None, experiment_name: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.parent_run_id = parent_run_id
        self.experiment_name = experiment_name

    def execute(self, context: Context) -> Any:
        """Do the work; the run ends as it does.

        :raises AirflowFailException: if another attempt would fail the same way.
        :raises AirflowException: if it may succeed.
        """
        bind_to_supervisor()
        key = task_key(context)
        run: JobRun | None = None
        try:
            run = self.persist(self._open, key)
            self._note(run, context["ti"])
            outcome = self.work(context, key, run)
        except (InvalidRequestError, DataError, ModelError, PermanentFailureError) as error:
            self._end(run, "FAILED", str(error))
            raise AirflowFailException(str(error)) from None
        except PostTrainingError as error:
            self._end(run, "FAILED", str(error))
            raise AirflowException(str(error)) from None
        except (AirflowSkipException, DownstreamTasksSkipped):
            self._end(run, "FINISHED")
            raise
        except BaseException as error:
            self._end(run, "FAILED", f"The task was interrupted: {type(error).__name__}.")
            raise
        self._end(run, "FINISHED")
        return outcome

    @abstractmethod
    def work(self, context: Context, key: TaskKey, run: JobRun) -> Any:
        """Do what the task is for; return what it hands on.

        :raises PostTrainingError: why it cannot.
        """

    @property
    def runs(self) -> StageRuns:
        """The runs of tasks that are no jobs."""
        return StageRuns(self.tracking)

    def _open(self, key: TaskKey) -> JobRun:
        return self.runs.open(key, experiment=said(self.experiment_name), parent=said(self.parent_run_id))

    def _note(self, run: JobRun, ti: Any) -> None:
        """Let task and run lead to each other."""
        url = self.tracking.server.run_url(run.experiment_id, run.run_id)
        MLflowRunLink().note(self, ti, url)
        self.persist(self.tracking.set_tags, run.run_id, {names.TAG_AIRFLOW_URL: ti.log_url})

    def _end(self, run: JobRun | None, status: str, error: str | None = None) -> None:
        """Write how the work ended; the task's own outcome does not hang on it."""
        if run is not None:
            with suppress(RecordUnavailableError):
                self.persist(lambda: self.tracking.set_status(run.run_id, status, error=error))

    def _run_program(
        self, program: str, spec: BaseModel, file: Path, result_file: str, result: type[Result]
    ) -> Result:
        """Run one of our programs on a spec, in a folder that is its own; return its result.

        :param file: where the spec is written, in the folder that the program works in.
        :raises TrainerError: if it ended without one, or says that another attempt may succeed.
        :raises PermanentFailureError: if it says that none would.
        """
        folder, written = file.parent, file.parent / result_file
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        written.unlink(missing_ok=True)
        file.write_text(spec.model_dump_json(indent=2), encoding="utf-8")
        code = self._run_process(program, file, file.with_suffix(".log"))
        if not written.exists():
            raise no_result(code)
        found = result.model_validate_json(written.read_bytes())
        shutil.rmtree(folder, ignore_errors=True)
        if found.status == "failed":
            kind = PermanentFailureError if found.permanent else TrainerError
            raise kind(found.error or f"{program} failed without a reason.")
        return found


def said(value: Any) -> Any:
    """Return None for what a template renders where there is nothing, also without native objects."""
    return None if value in (None, "", "None") else value


def parsed(given: Any, place: str) -> dict[str, Any]:
    """Read an object, or a JSON string of one: what a template rendered.

    :param place: the operator's parameter.
    :raises InvalidRequestError: if it is neither.
    """
    try:
        value = parse_json_object(given)
    except PydanticCustomError as error:
        raise InvalidRequestError.of(
            place,
            f"{error.message()}; a DAG without render_template_as_native_obj=True renders objects as Python"
            " text, use a tojson filter there",
        ) from None
    if not isinstance(value, Mapping):
        raise InvalidRequestError.of(place, f"must be an object, got {type(value).__name__}")
    return dict(value)


def checked(model: type[Config], given: Any, place: str) -> Config:
    """Validate what a template rendered.

    :param place: the operator's parameter, in front of every error's field.
    :raises InvalidRequestError: naming each field, rule and value.
    """
    try:
        return model.model_validate(given, strict=False, context=LENIENT)
    except ValidationError as error:
        details = error_details(error.errors())
        raise InvalidRequestError(
            [{**detail, "loc": [*filter(None, [place]), *detail["loc"]]} for detail in details]
        ) from None
