"""Jobs as the page shows them: a page of the list, one job, and the curves of several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from post_training.airflow_runs import JobFilter, JobTask
from post_training.errors import JobNotFoundError, RecordUnavailableError
from post_training.job_ids import (
    REQUEST_DAGS,
    SEARCH_SUFFIX,
    TaskKey,
    plan_task_id,
    trials_task_id,
)
from post_training.jobs import Access, JobService, Runs
from post_training.mending import Mender
from post_training.reconcile import Evidence, reconcile
from post_training.record import task_key
from post_training.run_reader import MAX_RUNS, RunReader
from post_training.schemas import record as names
from post_training.schemas.jobs import Checkpoint, JobStatus, PostTrainingJobStatusResponse
from post_training.schemas.requests import REQUESTS
from post_training.schemas.views import (
    ADAPTER_NAMES,
    FULL_FINE_TUNING,
    Curves,
    JobCurves,
    JobRow,
    JobsPage,
    JobView,
    ShownCheckpoint,
)
from post_training.tracking import JobRun, Tracking, precedence

MAX_PAGE_JOBS = MAX_RUNS
SPARK_POINTS = 40
CURVE_POINTS = 500

_VALIDATED = (
    names.METRIC_REWARD_CHOSEN,
    names.METRIC_REWARD_REJECTED,
    names.METRIC_REWARD_ACCURACY,
    names.METRIC_REWARD_MARGIN,
)
CHARTED = (
    names.METRIC_TRAIN_LOSS,
    names.METRIC_VALIDATION_LOSS,
    names.METRIC_PERPLEXITY,
    names.METRIC_LEARNING_RATE,
    names.METRIC_GRADIENT_NORM,
    names.METRIC_TOKENS_PER_SECOND,
    names.METRIC_PEAK_MEMORY_BYTES,
    *_VALIDATED,
    *(f"{names.VALIDATION_PREFIX}{name}" for name in _VALIDATED),
    names.METRIC_KL,
)
"""Metrics of which the page draws curves."""

_CLOCKS_APART = timedelta(minutes=5)


class JobViews:
    """Reads what the page shows.

    :param runs: the jobs' tasks in Airflow.
    :param tracking: makes the access to the jobs' runs in MLflow.
    :param jobs: the service that knows one job.
    :param reader: makes the access to many runs at once.
    """

    def __init__(
        self,
        runs: Runs,
        tracking: Callable[[], Tracking],
        jobs: JobService,
        reader: Callable[[Tracking], RunReader] = RunReader,
    ) -> None:
        self._runs = runs
        self._tracking = tracking
        self._jobs = jobs
        self._reader = reader
        self._mender = Mender(runs, tracking)

    def page(
        self,
        access: Access,
        *,
        status: JobStatus | None = None,
        text: str = "",
        dag_id: str | None = None,
        run_id: str | None = None,
        offset: int = 0,
        limit: int = 25,
    ) -> JobsPage:
        """Return some of the jobs that the caller may see, newest first.

        :param status: as Airflow knows it.
        :param text: stands in the job's id, algorithm, model or data, as it was submitted.
        :param dag_id: of this DAG alone.
        :param run_id: of this DAG run alone.
        """
        readable = {known for known in self._runs.dag_ids() if access.may_read(known)}
        wanted = JobFilter(readable if dag_id is None else readable & {dag_id}, status, text, run_id)
        tasks, total = self._runs.page(wanted, offset, limit)
        notice, records, sparks = None, {}, {}
        try:
            records = self._records(tasks)
            sparks = self._sparklines(records.values())
        except RecordUnavailableError as error:
            notice = f"Progress and losses are missing: {error}."
        rows = [self._row(task, records.get(task.key), sparks) for task in tasks]
        return JobsPage(jobs=rows, total=total, may_submit=may_submit(access), notice=notice)

    def _row(self, task: JobTask, run: JobRun | None, sparks: Mapping[str, list[float]]) -> JobRow:
        status = reconcile(self._mender.evidence(task, run)).status
        spark = sparks.get(run.run_id, []) if run is not None else []
        return JobRow(**_row(task.job_uuid, task.key, task, run, status), sparkline=spark)

    def _records(self, tasks: Sequence[JobTask]) -> dict[TaskKey, JobRun]:
        """Return the tasks' runs: by the ids in their DAG runs' confs, else one search for each DAG."""
        reader = self._reader(self._tracking())
        submitted = {str(task.conf.get(names.CONF_MLFLOW_RUN, "")) for task in tasks}
        records = _by_task(reader.by_id(submitted))
        missing = [task for task in tasks if task.key not in records and task.attempt > 0]
        for dag_id in {task.key.dag_id for task in missing}:
            of_dag = [task for task in missing if task.key.dag_id == dag_id]
            found = reader.of_dag(dag_id, *_span(of_dag))
            records = _by_task(found) | records
            if len(found) == MAX_RUNS:  # the DAG may have more runs of that time
                records |= self._one_by_one(task for task in of_dag if task.key not in records)
        return records

    def _one_by_one(self, tasks: Iterable[JobTask]) -> dict[TaskKey, JobRun]:
        tracking = self._tracking()
        return {task.key: run for task in tasks if (run := tracking.find(task.job_uuid)) is not None}

    def _sparklines(self, runs: Collection[JobRun]) -> dict[str, list[float]]:
        """Return the training losses of the runs that have one, in one call."""
        trained = [run.run_id for run in runs if names.METRIC_TRAIN_LOSS in run.metrics][:MAX_RUNS]
        if not trained:
            return {}
        reader = self._reader(self._tracking())
        curves = reader.curves(trained, names.METRIC_TRAIN_LOSS, SPARK_POINTS)
        return {run_id: values for run_id, (_, values) in curves.items()}

    def job(self, job_uuid: str, access: Access) -> JobView:
        """Return one job, its record mended where Airflow knows better; without MLflow what Airflow knows.

        :raises JobNotFoundError: if there is no such job, or the caller may not see it.
        :raises RecordUnavailableError: if neither answers that knows it.
        """
        try:
            status = self._jobs.status(job_uuid, access)
            task, run = self._jobs.locate(job_uuid, access)
        except RecordUnavailableError:
            task, run = self._runs.find(job_uuid), None
            if task is None or not access.may_read(task.key.dag_id):
                raise
            known = reconcile(self._mender.evidence(task, None)).status
            ended_at = task.ended_at if known.ended else None
            status = PostTrainingJobStatusResponse(job_uuid=job_uuid, status=known, completed_at=ended_at)
        key = task.key if task is not None else task_key(run.tags if run is not None else {})
        if key is None:  # somebody has changed the tags of a run whose task is gone
            raise JobNotFoundError(job_uuid)
        row = _row(job_uuid, key, task, run, status.status)
        return JobView(
            **row | {"completed_at": status.completed_at},
            error=status.error,
            warning=run.tags.get(names.TAG_WARNING) if run is not None else None,
            resources=status.resources_allocated,
            metrics=run.metrics if run is not None else {},
            params=_params(task, run),
            checkpoints=[self._shown(checkpoint, run) for checkpoint in status.checkpoints],
            mlflow_url=self._tracking().server.run_url(run.experiment_id, run.run_id) if run else None,
            retried=_retried(task) if task is not None else [],
            blocked=task is not None and task.blocked,
            **_rights(access, key, task, status.status, row["method"]),
        )

    def _shown(self, checkpoint: Checkpoint, run: JobRun | None) -> ShownCheckpoint:
        server = self._tracking().server
        url = server.checkpoint_url(run.experiment_id, checkpoint.path) if run is not None else None
        return ShownCheckpoint(**dict(checkpoint), mlflow_url=url)

    def curves(self, job_uuids: Sequence[str], access: Access) -> Curves:
        """Return the curves of several jobs: one call for each metric that one of them has.

        :raises JobNotFoundError: if one of them is none, or the caller may not see it.
        """
        runs = {job_uuid: self._jobs.locate(job_uuid, access)[1] for job_uuid in job_uuids}
        found = {run.run_id: run for run in runs.values() if run is not None}
        reader = self._reader(self._tracking())
        by_run: dict[str, dict[str, Any]] = {run_id: {} for run_id in found}
        for metric in CHARTED:
            having = [run_id for run_id, run in found.items() if metric in run.metrics]
            curves = reader.curves(having, metric, CURVE_POINTS) if having else {}
            for run_id, curve in curves.items():
                by_run[run_id][metric] = curve
        return Curves(
            jobs=[
                JobCurves(job_uuid=job_uuid, metrics=by_run[run.run_id] if run is not None else {})
                for job_uuid, run in runs.items()
            ]
        )

    def request(self, job_uuid: str, access: Access) -> tuple[str, dict[str, Any]]:
        """Return a job's method and request, to start another one like it.

        :return: the request with dotted keys where a request DAG ran it, else nested.
        :raises JobNotFoundError: if there is no such job, or the caller may not see it.
        :raises RecordUnavailableError: if MLflow does not hold the request.
        """
        task, run = self._jobs.locate(job_uuid, access)
        method = method_of(task.key.dag_id if task is not None else "", run)
        if method is None:
            raise RecordUnavailableError(f"the record of job {job_uuid!r} does not say what it trains")
        if task is not None and task.key.dag_id in REQUEST_DAGS:
            return method, {key: value for key, value in task.conf.items() if key != names.CONF_MLFLOW_RUN}
        if run is None:
            raise RecordUnavailableError(f"job {job_uuid!r} has no record yet")
        return method, self._reader(self._tracking()).request(run)


def may_submit(access: Access) -> bool:
    """Whether the caller may start jobs of any method."""
    return any(map(access.may_trigger, REQUESTS))


def method_of(dag_id: str, run: JobRun | None) -> str | None:
    """Return a job's training method, None where nobody says."""
    by_dag = dag_id.removesuffix(SEARCH_SUFFIX) if dag_id in REQUEST_DAGS else ""
    method = by_dag or (run.tags.get(names.TAG_METHOD, "") if run is not None else "")
    return method if method in REQUESTS else None


def algorithm_of(method: str | None, params: Mapping[str, Any]) -> str | None:
    """Return what a job's algorithm is called, by the set fields of its request or their text."""
    if method is None:
        return None
    group = "algorithm_config" if "algorithm_config.type" in params else "runtime.adapter"
    adapters = _adapters(group, params)
    if method == "preference_optimize":
        loss = str(params.get("algorithm_config.loss_type") or "sigmoid")
        return " · ".join(["DPO", *([] if loss == "sigmoid" else [loss]), *adapters])
    if params.get("algorithm_config.type") == "QAT":
        return " · ".join(["QAT", *_adapters("runtime.adapter", params)])
    return adapters[0] if adapters else FULL_FINE_TUNING


def _adapters(group: str, params: Mapping[str, Any]) -> list[str]:
    if params.get(f"{group}.type") != "LoRA":
        return []
    dora, quantized = (str(params.get(f"{group}.{name}")) == "True" for name in ("use_dora", "quantize_base"))
    return [ADAPTER_NAMES[dora, quantized]]


def _by_task(runs: Collection[JobRun]) -> dict[TaskKey, JobRun]:
    """Return runs by the task that each is the record of; of several, the newest attempt's."""
    found: dict[TaskKey, JobRun] = {}
    for run in runs:
        key = task_key(run.tags)
        if key is not None and (key not in found or precedence(run) > precedence(found[key])):
            found[key] = run
    return found


def _span(tasks: Sequence[JobTask]) -> tuple[datetime, datetime]:
    """Return the time in which the tasks' runs were made."""
    now = datetime.now(UTC)
    begins = [task.scheduled_at or now for task in tasks]
    ends = [task.ended_at or now for task in tasks]
    return min(begins) - _CLOCKS_APART, max(ends) + _CLOCKS_APART


def _params(task: JobTask | None, run: JobRun | None) -> dict[str, Any]:
    """Return the request's set fields by dotted path: as recorded, else as submitted."""
    if run is not None and run.params:
        return dict(run.params)
    conf = task.conf if task is not None and task.key.dag_id in REQUEST_DAGS else {}
    return {
        path: value
        for path, value in conf.items()
        if value not in (None, {}) and path != names.CONF_MLFLOW_RUN
    }


def _row(
    job_uuid: str, key: TaskKey, task: JobTask | None, run: JobRun | None, status: JobStatus
) -> dict[str, Any]:
    """Return the values of a ``JobRow``."""
    params, metrics = _params(task, run), run.metrics if run is not None else {}
    method = method_of(key.dag_id, run)
    return {
        "job_uuid": job_uuid,
        "dag_id": key.dag_id,
        "run_id": key.run_id,
        "task_id": key.task_id,
        "map_index": key.map_index,
        "status": status,
        "method": method,
        "algorithm": algorithm_of(method, params) if params else None,
        "model": params.get("model") or params.get("finetuned_model"),
        "attempt": task.attempt if task is not None else 0,
        "scheduled_at": task.scheduled_at if task is not None else (run.created_at if run else None),
        "started_at": task.started_at if task is not None else None,
        "completed_at": task.ended_at if task is not None and status.ended else None,
        "progress": metrics.get(names.METRIC_PROGRESS),
        "seconds_left": metrics.get(names.METRIC_SECONDS_LEFT) if status is JobStatus.in_progress else None,
        "train_loss": metrics.get(names.METRIC_TRAIN_LOSS),
        "validation_loss": metrics.get(names.METRIC_VALIDATION_LOSS),
    }


def _retried(task: JobTask) -> list[str | tuple[str, int]]:
    """Return the job's task, behind those of its search, which goes on in its study."""
    key = task.key
    own = key.task_id if key.map_index < 0 else (key.task_id, key.map_index)
    search = [plan_task_id(key.task_id), trials_task_id(key.task_id)] if task.searched else []
    return [*search, own]


def _rights(
    access: Access, key: TaskKey, task: JobTask | None, status: JobStatus, method: str | None
) -> dict[str, bool]:
    """Return which of the page's buttons would work."""
    lives = task is not None and Evidence(None, task.state).task_lives
    ended_badly = status in (JobStatus.failed, JobStatus.cancelled)
    return {
        "may_cancel": lives and not status.ended and access.may_cancel(key.dag_id),
        "may_retry": task is not None and not lives and ended_badly and access.may_retry(key.dag_id),
        "may_clone": method is not None and access.may_trigger(method),
        "may_read_logs": access.may_read_logs(key.dag_id),
    }
