"""Jobs as Airflow knows them. The only file that touches Airflow's metadata database.

It runs in the api-server; a task has no access to the database.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from airflow.api.common.mark_tasks import set_state
from airflow.api.common.trigger_dag import trigger_dag
from airflow.api_fastapi.core_api.datamodels.dag_run import DagRunMutableStates
from airflow.api_fastapi.core_api.services.public.dag_run import patch_dag_run_state
from airflow.assets.manager import asset_manager
from airflow.exceptions import DagNotFound, DagRunAlreadyExists, ParamValidationError
from airflow.models.asset import AssetModel
from airflow.models.dag import DagModel
from airflow.models.dagbag import DBDagBag
from airflow.models.dagrun import DagRun
from airflow.models.log import Log
from airflow.models.taskinstance import TaskInstance
from airflow.models.taskinstancehistory import TaskInstanceHistory
from airflow.models.trigger import Trigger
from airflow.utils.log.file_task_handler import StructuredLogMessage
from airflow.utils.log.log_reader import TaskLogReader
from airflow.utils.session import create_session
from airflow.utils.state import State, TaskInstanceState
from airflow.utils.types import DagRunTriggeredByType
from sqlalchemy import ColumnElement, String, and_, case, cast, exists, func, or_, select, tuple_
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, joinedload

from post_training.errors import (
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    RecordUnavailableError,
)
from post_training.job_ids import (
    MAY_BE_AN_ID,
    PREFERENCE_OPERATOR,
    REQUEST_DAGS,
    SEARCH_OPERATORS,
    SEARCH_SUFFIX,
    TRAINING_OPERATORS,
    TaskKey,
    candidate_keys,
    job_uuid_of,
    plan_task_id,
    request_dag,
    trials_task_id,
)
from post_training.reconcile import WAITING
from post_training.schemas.jobs import JobStatus
from post_training.schemas.views import ADAPTER_NAMES, FULL_FINE_TUNING

logger = logging.getLogger(__name__)

STOP_EVENT = "stop_training_job"
"""In Airflow's audit log: somebody ended an attempt at a job. Airflow's own entries do not say which attempt
they meant, and it has none of changes in bulk."""


SUPERVISED_DAGS = [request_dag("supervised_fine_tune", search=search) for search in (False, True)]
SEARCHED = (
    "model",
    "finetuned_model",
    "training_config.data_config.dataset_id",
    "training_config.data_config.validation_dataset_id",
    "algorithm_config.type",
    "algorithm_config.loss_type",
    "checkpoint_dir",
)
"""What a text is looked for in beside a job's id: paths of a submitted request. In all of it each field's own
name would be found too, in every job."""

_IS_A_JOB = and_(
    TaskInstance.custom_operator_name.in_(TRAINING_OPERATORS),
    # A stage that a retraining leaves out was never a job; a job that somebody skipped is one, and one whose
    # search was cancelled.
    or_(
        TaskInstance.dag_id.in_(REQUEST_DAGS),
        TaskInstance.state.is_(None),
        TaskInstance.state != TaskInstanceState.SKIPPED,
        TaskInstance.try_number > 0,
    ),
)


_OF_ITS_RUN = and_(DagRun.dag_id == TaskInstance.dag_id, DagRun.run_id == TaskInstance.run_id)
_NEWEST_FIRST = (
    DagRun.run_after.desc(),
    DagRun.id.desc(),
    TaskInstance.task_id,
    TaskInstance.map_index,
)


class RunExistsError(Exception):
    """The DAG has a run of this id already."""


@dataclass(frozen=True)
class JobTask:
    """One job's task. Times are UTC.

    :param state: Airflow's task state; None is not scheduled yet.
    :param attempt: how often it was tried.
    :param attempt_id: the task instance's id, another one for each attempt, also before it begins.
    :param conf: the DAG run's conf.
    :param searched: whether the tasks of a search come before it.
    :param blocked: whether a task before it, or before its search, has failed, so that it cannot begin.
    """

    key: TaskKey
    state: str | None
    attempt: int
    scheduled_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    attempt_id: str = ""
    conf: Mapping[str, Any] = field(default_factory=dict)
    searched: bool = False
    blocked: bool = False

    @property
    def job_uuid(self) -> str:
        """The id of the job that this task runs."""
        return job_uuid_of(self.key)


@dataclass(frozen=True)
class Progress:
    """How far a task of any kind, or a DAG run, has come. Times are UTC.

    :param state: Airflow's; None is a task that was not scheduled yet.
    """

    state: str | None
    ended_at: datetime | None


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows.

    :param dag_ids: the DAGs whose jobs may be shown.
    :param status: as Airflow knows it; where a record says more, a job may be shown with another one.
    :param text: stands in the job's id or one of ``SEARCHED``, whatever the case of letters; empty is any.
    :param run_id: of one DAG run; None is any.
    """

    dag_ids: Collection[str]
    status: JobStatus | None = None
    text: str = ""
    run_id: str | None = None


class AirflowRuns:
    """Starts, finds, lists and stops the DAG runs of jobs."""

    def trigger(self, dag_id: str, run_id: str, conf: dict[str, Any], user_name: str | None) -> None:
        """Start a DAG run.

        :raises RunExistsError: if the DAG has a run of this id.
        :raises InvalidRequestError: if the conf does not fit the DAG's params.
        :raises RecordUnavailableError: if the DAG is not known yet or the database is busy.
        """
        try:
            with _database():
                trigger_dag(
                    dag_id,
                    triggered_by=DagRunTriggeredByType.REST_API,
                    run_id=run_id,
                    conf=conf,
                    triggering_user_name=user_name,
                )
        except (DagRunAlreadyExists, IntegrityError):
            raise RunExistsError(run_id) from None
        except DagNotFound:
            raise RecordUnavailableError(f"Airflow has not read the DAG {dag_id!r} yet") from None
        except ParamValidationError as error:
            raise InvalidRequestError.of("conf", str(error).partition("\n")[0]) from None

    def find(self, job_uuid: str) -> JobTask | None:
        """Return the job's task, None where Airflow has no such task."""
        if not MAY_BE_AN_ID.fullmatch(job_uuid):
            return None
        of_a_request = and_(TaskInstance.run_id == job_uuid, TaskInstance.dag_id.in_(REQUEST_DAGS))
        found = self._find(of_a_request)
        if found is not None or job_uuid.count(".") < 2:
            return found
        place = (TaskInstance.dag_id, TaskInstance.run_id, TaskInstance.task_id, TaskInstance.map_index)
        candidates = [astuple(key) for key in candidate_keys(job_uuid, self.dag_ids(prefix_of=job_uuid))]
        return self._find(tuple_(*place).in_(candidates)) if candidates else None

    def find_task(self, key: TaskKey) -> JobTask | None:
        """Return the task of this place, None where Airflow has none there that is a job."""
        return self._find(_is(TaskInstance, key))

    def progress(self, key: TaskKey, *, of_run: bool = False) -> Progress | None:
        """Return how far a task has come, be it a job or not; None where Airflow has none there.

        :param of_run: of the DAG run instead.
        """
        table: Any = DagRun if of_run else TaskInstance
        wanted = and_(DagRun.dag_id == key.dag_id, DagRun.run_id == key.run_id)
        query = select(table.state, table.end_date).where(wanted if of_run else _is(TaskInstance, key))
        with _database(), create_session() as session:
            row = session.execute(query).first()
        if row is None:
            return None
        state, ended_at = row
        return Progress(str(state) if state is not None else None, ended_at)

    def _find(self, condition: ColumnElement[bool]) -> JobTask | None:
        query = (
            select(TaskInstance, DagRun)
            .join(DagRun, _OF_ITS_RUN)
            .where(_IS_A_JOB, condition)
            .order_by(DagRun.id)  # both request DAGs may have a run of this id: the first is the job of it
            .limit(1)
        )
        with _database(), create_session() as session:
            row = session.execute(query).first()
            return _with_search(session, _job_task(*row)) if row is not None else None

    def job_uuids(self, dag_ids: Collection[str]) -> list[str]:
        """Return the ids of all jobs of these DAGs, newest first."""
        columns = (TaskInstance.dag_id, TaskInstance.run_id, TaskInstance.task_id, TaskInstance.map_index)
        query = (
            select(*columns)
            .join(DagRun, _OF_ITS_RUN)
            .where(_IS_A_JOB, TaskInstance.dag_id.in_(dag_ids))
            .order_by(*_NEWEST_FIRST)
        )
        with _database(), create_session() as session:
            return [job_uuid_of(TaskKey(*row)) for row in session.execute(query)]

    def page(self, wanted: JobFilter, offset: int, limit: int) -> tuple[list[JobTask], int]:
        """Return some of the jobs that a filter lets through, newest first, and their number in all."""
        conditions = (_IS_A_JOB, *_conditions(wanted))
        # Ids first: a database that sorts whole rows carries all of their confs along.
        ids = select(TaskInstance.id).join(DagRun, _OF_ITS_RUN).where(*conditions).order_by(*_NEWEST_FIRST)
        rows = select(TaskInstance, DagRun).join(DagRun, _OF_ITS_RUN).order_by(*_NEWEST_FIRST)
        with _database(), create_session() as session:
            if wanted.text:  # no index knows it: every conf is read, and that once
                every = session.scalars(ids).all()
                shown, total = every[offset : offset + limit], len(every)
            else:  # every task has its run: they need not be joined to be counted
                count = select(func.count()).select_from(TaskInstance).where(*conditions)
                shown = session.scalars(ids.offset(offset).limit(limit)).all()
                total = session.scalar(count) or 0
            found = session.execute(rows.where(TaskInstance.id.in_(shown))).all()
            return [_with_search(session, _job_task(*row)) for row in found], total

    def dag_ids(self, *, prefix_of: str | None = None) -> set[str]:
        """Return the DAGs that have training tasks or take requests.

        :param prefix_of: a job's id: only such DAGs are looked for as its beginning may name, by their index;
            without it every task of the deployment is looked at.
        """
        query = select(TaskInstance.dag_id).where(_IS_A_JOB).distinct()
        if prefix_of is not None:
            prefixes = [prefix_of[:at] for at, letter in enumerate(prefix_of) if letter == "."]
            query = query.where(TaskInstance.dag_id.in_(prefixes))
        with _database(), create_session() as session:
            return set(REQUEST_DAGS) | set(session.scalars(query))

    def cancel(self, key: TaskKey, user_name: str) -> None:
        """Fail the job's task and its search's, which ends them; others of a larger DAG go their own way.

        :param user_name: who asked for it, for Airflow's audit log.
        :raises JobNotFoundError: if the run is gone.
        :raises JobConflictError: if the task has ended.
        """
        with _database(), create_session() as session:
            run = _dag_run(session, key)
            task = session.scalar(select(TaskInstance).where(_is(TaskInstance, key)))
            if task is not None and task.state in State.finished:
                raise JobConflictError(f"job {job_uuid_of(key)!r} has ended")
            dag = DBDagBag().get_dag_for_run(run, session=session)
            if dag is None:
                raise RecordUnavailableError(f"Airflow cannot read the DAG {key.dag_id!r}")
            session.add(_stop_entry(key, str(task.id) if task is not None else "", user_name))
            if key.dag_id in REQUEST_DAGS:
                patch_dag_run_state(dag=dag, dag_run=run, state=DagRunMutableStates.FAILED, session=session)
                return
            # The DAG's own set_task_instance_state would also clear, and so start, failed tasks behind it.
            set_state(
                tasks=[
                    (dag.get_task(task_id), map_index) for task_id, map_index in _unfinished(session, key)
                ],
                run_id=key.run_id,
                state=TaskInstanceState.FAILED,
                commit=True,
                session=session,
            )

    def update_asset(self, uri: str, extra: dict[str, Any]) -> None:
        """Emit an event of an asset, which starts the DAGs that are scheduled on it; none knows it: nothing.

        :raises RecordUnavailableError: if the database is busy.
        """
        with _database(), create_session() as session:
            for asset in session.scalars(select(AssetModel).where(AssetModel.uri == uri)):
                asset_manager.register_asset_change(asset=asset, extra=extra, session=session)

    def note_stop(self, key: TaskKey, attempt_id: str) -> None:
        """Write into Airflow's audit log that somebody ended this attempt in Airflow's own pages."""
        with _database(), create_session() as session:
            session.add(_stop_entry(key, attempt_id, "airflow"))

    def was_stopped(self, task: JobTask) -> bool:
        """Whether somebody ended the task's newest attempt, through us or in Airflow's own pages."""
        key = task.key
        query = select(Log.extra).where(
            Log.dag_id == key.dag_id,
            Log.run_id == key.run_id,
            Log.task_id == key.task_id,
            Log.event == STOP_EVENT,
        )
        with _database(), create_session() as session:
            entries = session.scalars(query).all()
        return any(json.loads(extra or "{}").get("attempt_id") == task.attempt_id for extra in entries)

    def log_lines(self, key: TaskKey, attempt: int, until: datetime | None = None) -> Iterator[str]:
        """Yield the lines that one attempt of the task has logged so far; none where there is no log (yet).

        Airflow sorts them by their time in milliseconds. The supervisor's own may be in the log before older
        ones of its task.

        They come from wherever Airflow keeps them: local files, the worker that runs the task, remote
        storage. Airflow reads an attempt's log as a whole, spilling it to a temporary file: 4 s for 100,000
        lines.

        :param attempt: counted from 1.
        :param until: time of the last line; None is all of them.
        """
        with _database(), create_session() as session:
            instance = _attempt(session, key, attempt)
            if instance is None:
                return
            # A position, even the first one, leaves out the header that names files and hosts.
            messages, _ = TaskLogReader().read_log_chunks(
                instance, attempt, {"end_of_log": False, "log_pos": 0}
            )
            for message in messages:
                if until is not None and _time(message, until) > until:
                    return
                yield from _log_line(message)


def team_of(dag_id: str) -> str | None:
    """Return the team that a DAG belongs to, None without teams."""
    with _database():
        return DagModel.get_team_name(dag_id)


@contextmanager
def _database() -> Iterator[None]:
    """Turn the database's failures into errors that callers know; their text names hosts and statements."""
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        logger.warning("Airflow's database does not answer: %s", _first_line(error))
        raise RecordUnavailableError("Airflow's database is busy") from error
    except PoolTimeoutError as error:
        raise RecordUnavailableError("Airflow's database is busy: no connection became free") from error
    except DataError as error:
        reason = f"Airflow's database cannot hold it: {_first_line(error)}"
        raise InvalidRequestError.of("request", reason) from error


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).partition("\n")[0]


def _dag_run(session: Session, key: TaskKey) -> DagRun:
    query = select(DagRun).where(DagRun.dag_id == key.dag_id, DagRun.run_id == key.run_id)
    run: DagRun | None = session.scalar(query)
    if run is None:
        raise JobNotFoundError(job_uuid_of(key))
    return run


def _is(table: Any, key: Any) -> ColumnElement[bool]:
    """Match the rows of one task.

    :param key: a ``TaskKey``, or another table with its four columns.
    """
    return and_(
        table.dag_id == key.dag_id,
        table.run_id == key.run_id,
        table.task_id == key.task_id,
        table.map_index == key.map_index,
    )


def _unfinished(session: Session, key: TaskKey) -> Sequence[tuple[str, int]]:
    """Return the tasks that may still do something for a job, its search's too, by id and map index."""
    of_search = and_(
        TaskInstance.dag_id == key.dag_id,
        TaskInstance.run_id == key.run_id,
        TaskInstance.task_id.in_([plan_task_id(key.task_id), trials_task_id(key.task_id)]),
        TaskInstance.operator.in_(SEARCH_OPERATORS),
    )
    query = (
        select(TaskInstance.task_id, TaskInstance.map_index)
        .where(or_(_is(TaskInstance, key), of_search))
        .where(or_(TaskInstance.state.is_(None), TaskInstance.state.not_in(State.finished)))
    )
    return [(task_id, map_index) for task_id, map_index in session.execute(query)]


def _conditions(wanted: JobFilter) -> Iterator[ColumnElement[bool]]:
    yield TaskInstance.dag_id.in_(wanted.dag_ids)
    if wanted.run_id is not None:
        yield TaskInstance.run_id == wanted.run_id
    if wanted.status is not None:
        yield _has_status(wanted.status)
    if wanted.text:
        yield _mentions(wanted.text)


def _has_status(status: JobStatus) -> ColumnElement[bool]:
    state = TaskInstance.state
    failed = state.in_((TaskInstanceState.FAILED, TaskInstanceState.UPSTREAM_FAILED))
    waiting = or_(state.is_(None), state.in_([name for name in WAITING if name is not None]))
    conditions: dict[JobStatus, ColumnElement[bool]] = {
        JobStatus.scheduled: waiting,
        JobStatus.in_progress: and_(state.not_in(State.finished), ~waiting),
        JobStatus.completed: state == TaskInstanceState.SUCCESS,
        JobStatus.failed: and_(failed, ~_was_stopped()),
        JobStatus.cancelled: or_(
            state.in_((TaskInstanceState.SKIPPED, TaskInstanceState.REMOVED)), and_(failed, _was_stopped())
        ),
    }
    return conditions[status]


def _was_stopped() -> ColumnElement[bool]:
    """Match tasks whose newest attempt somebody ended: the audit log names it in JSON, with dashes."""
    attempt = func.replace(cast(TaskInstance.id, String), "-", "")
    of_the_task = _is(Log, TaskInstance)
    return exists().where(
        Log.event == STOP_EVENT, of_the_task, func.replace(Log.extra, "-", "").contains(attempt)
    )


def _mentions(text: str) -> ColumnElement[bool]:
    """Match jobs whose id, algorithm, model or data holds a text."""
    place = TaskInstance.dag_id + "." + TaskInstance.run_id + "." + TaskInstance.task_id
    number = "." + cast(TaskInstance.map_index, String)
    job_uuid = case(
        (TaskInstance.dag_id.in_(REQUEST_DAGS), TaskInstance.run_id),
        (TaskInstance.map_index >= 0, place + number),
        else_=place,
    )
    values = (DagRun.conf[name].as_string() for name in SEARCHED)
    held = (value.icontains(text, autoescape=True) for value in (job_uuid, *values))
    return or_(*held, *(are for name, are in _shown_as() if text.lower() in name.lower()))


def _shown_as() -> Iterator[tuple[str, ColumnElement[bool]]]:
    """Yield names that the page gives to algorithms and no field holds, and the jobs that have each."""

    def values(name: str) -> list[ColumnElement[str]]:
        paths = (f"{group}.{name}" for group in ("algorithm_config", "runtime.adapter"))
        return [func.coalesce(DagRun.conf[path].as_string(), "") for path in paths]

    def is_set(name: str) -> ColumnElement[bool]:
        # SQLite has 1 for JSON's true; a cast to a boolean fails on whatever else a DAG's conf holds.
        return or_(*(value.in_(("true", "1")) for value in values(name)))

    yield "DPO", TaskInstance.custom_operator_name == PREFERENCE_OPERATOR
    whole = (kind.not_in(("LoRA", "QAT")) for kind in values("type"))
    yield FULL_FINE_TUNING, and_(TaskInstance.dag_id.in_(SUPERVISED_DAGS), *whole)
    flags = is_set("use_dora"), is_set("quantize_base")
    for wanted, name in ADAPTER_NAMES.items():
        if any(wanted):  # plain ones are found by their type
            yield name, and_(*(flag if on else ~flag for flag, on in zip(flags, wanted, strict=True)))


def _stop_entry(key: TaskKey, attempt_id: str, user_name: str) -> Log:
    return Log(
        event=STOP_EVENT,
        owner=user_name,
        dag_id=key.dag_id,
        run_id=key.run_id,
        task_id=key.task_id,
        map_index=key.map_index,
        extra=json.dumps({"attempt_id": attempt_id}),
    )


def _attempt(session: Session, key: TaskKey, attempt: int) -> TaskInstance | TaskInstanceHistory | None:
    """Find the row of one attempt, which knows the host that it ran on, with all that a reader of logs asks.

    Airflow's reader closes the session of this thread; what is not loaded by then cannot be had.
    """
    tables: tuple[tuple[Any, ...], ...] = (
        (
            TaskInstance,
            joinedload(TaskInstance.trigger).joinedload(Trigger.triggerer_job),
            joinedload(TaskInstance.dag_model),
        ),
        (TaskInstanceHistory, joinedload(TaskInstanceHistory.dag_run)),
    )
    for table, *loaded in tables:
        query = select(table).where(_is(table, key), table.try_number == attempt).options(*loaded)
        row: TaskInstance | TaskInstanceHistory | None = session.scalar(query)
        if row is not None:
            return row
    return None


def _job_task(task: TaskInstance, run: DagRun) -> JobTask:
    return JobTask(
        key=TaskKey(task.dag_id, task.run_id, task.task_id, task.map_index),
        state=str(task.state) if task.state is not None else None,
        attempt=task.try_number,
        scheduled_at=run.created_at or run.run_after,  # queued_at moves when the run is cleared
        started_at=task.start_date,
        ended_at=task.end_date,
        attempt_id=str(task.id),
        conf=dict(run.conf or {}),
        blocked=task.state == TaskInstanceState.UPSTREAM_FAILED,
    )


def _with_search(session: Session, task: JobTask) -> JobTask:
    """Let a job begin with its search, if it has one."""
    if task.key.dag_id in REQUEST_DAGS and not task.key.dag_id.endswith(SEARCH_SUFFIX):
        return task  # its DAG has no search
    plan = session.execute(
        select(TaskInstance.start_date, TaskInstance.state).where(
            _is(TaskInstance, replace(task.key, task_id=plan_task_id(task.key.task_id), map_index=-1)),
            TaskInstance.operator.in_(SEARCH_OPERATORS),
        )
    ).first()
    if plan is None:
        return task
    started_at, state = plan
    blocked = state == TaskInstanceState.UPSTREAM_FAILED
    return replace(task, started_at=started_at or task.started_at, searched=True, blocked=blocked)


def _time(message: StructuredLogMessage, default: datetime) -> datetime:
    moment = message.timestamp or default
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)  # code of a task may write it


def _log_line(message: StructuredLogMessage) -> Iterator[str]:
    """Yield a message's text with the exception that it reports; nothing for a mark of Airflow's groups."""
    if message.event.startswith(("::group::", "::endgroup::")):
        return
    yield ": ".join([message.event, *_causes((message.model_extra or {}).get("error_detail"))[:1]])


def _causes(error_detail: Any) -> list[str]:
    """Return the exceptions of a message as text; code of a task may write anything under the same name."""
    details = error_detail if isinstance(error_detail, list) else []
    return [
        f"{detail['exc_type']}: {detail['exc_value']}"
        for detail in details
        if isinstance(detail, Mapping) and {"exc_type", "exc_value"} <= detail.keys()
    ]
