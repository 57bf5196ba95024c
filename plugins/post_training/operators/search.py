"""The operators of a hyperparameter search: one task plans it, mapped tasks run its trials side by side.

The job's own task comes behind them and takes the best; ``search_before`` puts them in front of it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import TriggerRule

from post_training.errors import RecordUnavailableError
from post_training.job_ids import TaskKey, job_uuid_of
from post_training.operators.search_task import SearchOperator, search_of
from post_training.operators.search_trials import SearchTrialsOperator
from post_training.operators.spec import resolver_of
from post_training.record import identity_tags, new_run
from post_training.schemas import record as names
from post_training.schemas.requests import AnyTrainingRequest
from post_training.tracking import JobRun

if TYPE_CHECKING:
    from airflow.sdk import Context

    from post_training.operators.training import TrainingOperator

__all__ = ["PlanSearchOperator", "SearchTrialsOperator", "search_before"]


class PlanSearchOperator(SearchOperator):
    """Check the request, begin the study, and return the numbers of the workers that are to run its trials.

    The job's run is in progress from here on.
    """

    def work(self, context: Context) -> list[int]:
        """Plan the search.

        :raises PostTrainingError: why there can be none.
        """
        key = self.job_key(context)
        request = self.build_request(key)
        self.persist(lambda: resolver_of(self.tracking).check(request))
        search = search_of(request)
        run = self.persist(lambda: self._begin_job(context, request, key))
        self.mlflow_run_url = self.tracking.server.run_url(run.experiment_id, run.run_id)
        self.persist(search.begin)
        return list(range(min(search.config.max_parallel, search.config.n_trials)))

    def _begin_job(self, context: Context, request: AnyTrainingRequest, key: TaskKey) -> JobRun:
        """Return the job's run, RUNNING, unless it holds what was completed before."""
        run = self.job_run(context)
        if run is None:
            run = self.tracking.create_run(**new_run(request, key, resolver_of(self.tracking).pins(request)))
        if not run.completed:
            self.tracking.set_status(run.run_id, "RUNNING")
        return run

    def ends(self, context: Context, error: str) -> None:
        """Let the job's run say why there is no search: its task will not run."""
        try:
            self.persist(lambda: self._refuse(context, error))
        except RecordUnavailableError as unavailable:
            self.log.warning("The job's record is left as it is: %s", unavailable)

    def _refuse(self, context: Context, error: str) -> None:
        run, key = self.job_run(context), self.job_key(context)
        if run is None:
            run = self.tracking.create_run(
                name=job_uuid_of(key),
                experiment=None,
                tags={**identity_tags(key), names.TAG_METHOD: self.method},
                params={},
                request={},
            )
        if not run.completed:
            self.tracking.set_status(run.run_id, "FAILED", error=error)


def search_before(
    train: TrainingOperator, *, retries: int = 5, retry_delay: timedelta = timedelta(seconds=30)
) -> None:
    """Put a search in front of a job's task, which then takes the best of its trials.

    The task runs when all workers have ended, if there was a plan: trials that some of them finished count.

    :param retries: of each worker; each goes on where the one before was cut.
    """
    given = {name: getattr(train, name) for name in train.request_fields}
    shared: dict[str, Any] = {
        "method": train.method,
        "request": train.request,
        "fields": {name: value for name, value in given.items() if value is not None} or None,
        "job_task_id": train.task_id,
        "post_training_conn_id": train.post_training_conn_id,
        "retries": retries,
        "retry_delay": retry_delay,
        "pool": train.pool,
    }
    prefix = "" if train.task_id == names.REQUEST_TASK_ID else f"{train.task_id}_"
    plan = PlanSearchOperator(task_id=f"{prefix}plan", **shared)
    trials = SearchTrialsOperator.partial(task_id=f"{prefix}trials", **shared).expand(worker=plan.output)
    train.trigger_rule = TriggerRule.ALL_DONE_MIN_ONE_SUCCESS
    plan >> trials >> train
    plan >> train
