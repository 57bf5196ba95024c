"""What the tasks of a search share: the request that they vary, the study, and the run of the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.exceptions import AirflowException, AirflowFailException

from post_training.errors import InvalidRequestError, ModelError, PostTrainingError, SupersededError
from post_training.job_ids import SEARCH_OPERATORS, TaskKey, job_uuid_of, request_dag
from post_training.operators.links import JobLink, MLflowRunLink
from post_training.operators.request import build_request, was_there
from post_training.operators.stage import said
from post_training.operators.task_record import TaskRecord
from post_training.operators.worker import PermanentFailureError, WorkerOperator, bind_to_supervisor
from post_training.schemas import record as names
from post_training.schemas.requests import AnyTrainingRequest
from post_training.schemas.search_rules import longest
from post_training.search import NoSearchError, Search, study_name
from post_training.search_parts import SearchUnavailableError
from post_training.settings import load_settings
from post_training.tracking import JobRun, Tracking

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator, Context

FIELD = "hyperparam_search_config"

PERMANENT = (
    InvalidRequestError,
    ModelError,
    NoSearchError,
    PermanentFailureError,
    SearchUnavailableError,
    SupersededError,
)
"""Errors that another attempt would meet again, or that end this one alone."""


class SearchOperator(WorkerOperator):
    """A task of a search, before the task that is the job.

    :param method: training method of the job.
    :param request: the job's request, as its task has it.
    :param fields: single fields of it, given instead.
    :param job_task_id: the job's task, in the same DAG run.
    :param post_training_conn_id: connection with the defaults of ``runtime``; None is the setting.
    :param parent_run_id: MLflow run below which the job's is shown.
    """

    operator_extra_links = (JobLink(), MLflowRunLink())
    template_fields: Sequence[str] = ("request", "fields", "parent_run_id")
    template_fields_renderers: ClassVar[dict[str, str]] = {"request": "json", "fields": "json"}
    ui_color = "#f4f0e4"

    def __init__(
        self,
        *,
        method: str,
        request: Mapping[str, Any] | str | None = None,
        fields: Mapping[str, Any] | None = None,
        job_task_id: str = names.REQUEST_TASK_ID,
        post_training_conn_id: str | None = None,
        parent_run_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.method = method
        self.request = request
        self.fields = fields
        self.job_task_id = job_task_id
        self.post_training_conn_id = post_training_conn_id
        self.parent_run_id = parent_run_id

    def execute(self, context: Context) -> Any:
        """Do the task's part of the search.

        :raises AirflowFailException: if another attempt would fail the same way.
        :raises AirflowException: if it may succeed.
        """
        bind_to_supervisor()
        JobLink().note(self, context["ti"])
        try:
            return self.work(context)
        except PostTrainingError as error:
            permanent = isinstance(error, PERMANENT) and not self._may_come_back(error, context)
            if permanent or context["ti"].try_number > context["ti"].max_tries:
                self.ends(context, str(error))
            raise (AirflowFailException if permanent else AirflowException)(str(error)) from None

    def work(self, context: Context) -> Any:
        """Do it; return what the task hands on.

        :raises PostTrainingError: why it cannot.
        """
        raise NotImplementedError

    def ends(self, context: Context, error: str) -> None:
        """Do what is left when the task has failed for good."""

    def _may_come_back(self, error: PostTrainingError, context: Context) -> bool:
        """Whether something is away that was there when the request was accepted."""
        accepted = names.CONF_MLFLOW_RUN in (context["dag_run"].conf or {})
        return isinstance(error, InvalidRequestError) and was_there(error) and accepted

    def _lead_to_job(self, run: JobRun, context: Context) -> None:
        """Let the task lead to the job's run, below which the trials are."""
        url = self.tracking.server.run_url(run.experiment_id, run.run_id)
        MLflowRunLink().note(self, context["ti"], url)

    def job_key(self, context: Context) -> TaskKey:
        """Return the job's place."""
        ti = context["ti"]
        return TaskKey(ti.dag_id, ti.run_id, self.job_task_id)

    def build_request(self, key: TaskKey) -> AnyTrainingRequest:
        """Validate what was given into the job's request.

        :raises InvalidRequestError: naming each field, rule and value.
        """
        return build_request(self.method, job_uuid_of(key), self.request, self.fields or {})

    def job_run(self, context: Context) -> JobRun | None:
        """Return the job's run, None before there is one."""
        return self.record(context).existing()

    def record(self, context: Context) -> TaskRecord:
        """Return the record of the job."""
        submitted = (context["dag_run"].conf or {}).get(names.CONF_MLFLOW_RUN)
        return TaskRecord(
            self.tracking, self.job_key(context), context["ti"], submitted, said(self.parent_run_id)
        )


def search_of(request: AnyTrainingRequest) -> Search:
    """Return the study of a request that asks for a search; it is neither made nor looked for yet.

    :raises SearchUnavailableError: if a library is missing.
    """
    config = request.search
    assert config is not None, "a request without a search has no study"  # noqa: S101
    settings = load_settings()
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Search(settings.search_storage, study_name(request), config, longest(request, config))


def search_that_ran(request: AnyTrainingRequest, task: BaseOperator) -> Search:
    """Return the study whose trials have come before a job's task.

    :raises NoSearchError: if it is not to be found here.
    :raises InvalidRequestError: if the task asks for a search that nobody makes.
    """
    try:
        return search_of(request).open()
    except NoSearchError:
        if any(one.task_type in SEARCH_OPERATORS for one in task.upstream_list):
            raise
        dag_id = request_dag(request.method, search=True)
        raise InvalidRequestError.of(
            FIELD,
            f"must be {{}} in this DAG: trials run in the DAG {dag_id!r}, or in the tasks that"
            " post_training.operators.search.search_before puts in front",
        ) from None


def tracked(tracking: Tracking, run_id: str) -> JobRun:
    """Return a run that is known to be there.

    :raises PermanentFailureError: if somebody has deleted it.
    """
    run = tracking.get(run_id)
    if run is None:
        raise PermanentFailureError(f"MLflow run {run_id} of a trial was deleted.")
    return run
