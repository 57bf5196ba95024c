"""The operators of a hyperparameter search: one task plans it, mapped tasks run its trials side by side.

The job's own task comes behind them and takes the best; ``search_before`` puts them in front of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import TriggerRule
from airflow.sdk.exceptions import AirflowSkipException

from post_training.errors import InvalidRequestError
from post_training.job_ids import REQUEST_DAGS, TaskKey, plan_task_id, trials_task_id
from post_training.operators.search_task import FIELD, SearchOperator, search_of
from post_training.operators.search_trials import SearchTrialsOperator
from post_training.operators.spec import resolver_of

if TYPE_CHECKING:
    from airflow.sdk import Context

    from post_training.operators.training import TrainingOperator

__all__ = ["PlanSearchOperator", "SearchTrialsOperator", "search_before"]


class PlanSearchOperator(SearchOperator):
    """Check the request, begin the study, and return the numbers of the workers that are to run its trials.

    The job's run is in progress from here on.

    :param required: whether a request without a search is refused; else the one worker has nothing to do, and
        the job's task trains what is asked for.
    """

    def __init__(self, *, required: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.required = required

    def work(self, context: Context) -> list[int]:
        """Plan the search.

        :raises AirflowSkipException: if the job has been completed and its task is not to run.
        :raises PostTrainingError: why there can be none.
        """
        key = self.job_key(context)
        request = self.build_request(key)
        if request.search is None:
            self._check_required(key)
            return [0]  # with no worker at all the job's task would be skipped
        resolver = resolver_of(self.tracking)
        self.persist(lambda: resolver.check(request))
        search = search_of(request)
        self._check_job_is_to_run(context)
        record = self.record(context)
        run = self.persist(lambda: record.plan(request, resolver.pins(request)))
        self._lead_to_job(run, context)
        self.persist(lambda: search.begin(run.run_id))
        return list(range(min(search.config.max_parallel, search.config.n_trials)))

    def _check_required(self, key: TaskKey) -> None:
        """Refuse a request without a search where there must be one.

        :raises InvalidRequestError: naming the field.
        """
        if self.required:
            elsewhere = f"; the DAG {self.method!r} trains without one" if key.dag_id in REQUEST_DAGS else ""
            raise InvalidRequestError.of(FIELD, f"must hold a search here, got {{}}{elsewhere}")
        self.log.info("The request asks for no search.")

    def _check_job_is_to_run(self, context: Context) -> None:
        """Leave a completed job alone where somebody has cleared this task without the job's."""
        run, ti = self.persist(lambda: self.job_run(context)), context["ti"]
        if run is not None and run.completed:
            states = ti.get_task_states(dag_id=ti.dag_id, task_ids=[self.job_task_id], run_ids=[ti.run_id])
            if states.get(ti.run_id, {}).get(self.job_task_id) == "success":
                raise AirflowSkipException(
                    f"The job is completed: clear its task {self.job_task_id!r}, too, to search anew."
                )

    def ends(self, context: Context, error: str) -> None:
        """Let the job's run say why there is no search: its task will not run."""
        record = self.record(context)
        record.refuse(self.method, error)
        self.mlflow_run_url = record.url


AS_THE_JOBS = (
    "executor",
    "executor_config",
    "owner",
    "parent_run_id",
    "pool",
    "pool_slots",
    "post_training_conn_id",
    "priority_weight",
    "queue",
    "retries",
    "retry_delay",
)
"""What the tasks of a search have in common with the job's."""


def search_before(train: TrainingOperator, *, required: bool = True) -> PlanSearchOperator:
    """Put a search in front of a job's task, which then takes the best of its trials.

    The job's task runs when all workers have ended, if there was a plan: trials that some of them finished
    count. Each retry goes on where the attempt before was cut.

    :param train: the job's task.
    :param required: whether a request without a search is refused, instead of trained.
    :returns: the plan, which has the job's trigger rule: what comes before the job is to come before this.
    :raises ValueError: if a task is directly before the job's already.
    """
    given = {name: getattr(train, name) for name in train.request_fields}
    shared: dict[str, Any] = {
        "method": train.method,
        "request": train.request,
        "fields": {name: value for name, value in given.items() if value is not None} or None,
        "job_task_id": train.task_id,
        **{name: getattr(train, name) for name in AS_THE_JOBS},
    }
    plan = PlanSearchOperator(
        task_id=plan_task_id(train.task_id), trigger_rule=train.trigger_rule, required=required, **shared
    )
    if misplaced := train.upstream_task_ids - plan.upstream_task_ids:
        raise ValueError(
            f"{', '.join(sorted(misplaced))} must come before the plan that search_before returns,"
            f" not before {train.task_id!r} itself"
        )
    train.trigger_rule = TriggerRule.ALL_DONE_MIN_ONE_SUCCESS
    trials = SearchTrialsOperator.partial(task_id=trials_task_id(train.task_id), **shared)
    plan >> trials.expand(worker=plan.output) >> train
    plan >> train
    return plan
