"""Jobs as Airflow knows them. The only file that touches Airflow's metadata database.

It runs in the api-server; a task has no access to the database.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from datetime import datetime
from typing import Any

from airflow.api.common.trigger_dag import trigger_dag
from airflow.api_fastapi.core_api.datamodels.dag_run import DagRunMutableStates
from airflow.api_fastapi.core_api.services.public.dag_run import patch_dag_run_state
from airflow.exceptions import DagNotFound, DagRunAlreadyExists, ParamValidationError
from airflow.models.dag import DagModel
from airflow.models.dagbag import DBDagBag
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.utils.log.log_reader import TaskLogReader
from airflow.utils.session import create_session
from airflow.utils.state import TaskInstanceState
from airflow.utils.types import DagRunTriggeredByType
from sqlalchemy import ColumnElement, and_, select, tuple_
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from post_training.errors import InvalidRequestError, JobNotFoundError, RecordUnavailableError
from post_training.job_ids import MAY_BE_AN_ID, REQUEST_DAGS, TaskKey, candidate_keys, job_uuid_of

TRAINING_OPERATORS = ("SupervisedFineTuneOperator", "PreferenceOptimizeOperator")
"""Class names by which the task-instance table knows the tasks that are jobs."""


class RunExistsError(Exception):
    """The DAG has a run of this id already."""


@dataclass(frozen=True)
class JobTask:
    """One job's task. Times are UTC.

    :param state: Airflow's task state; None is not scheduled yet.
    :param conf: the DAG run's conf.
    """

    key: TaskKey
    state: str | None
    attempt: int
    scheduled_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    conf: Mapping[str, Any] = field(default_factory=dict)

    @property
    def job_uuid(self) -> str:
        """The id of the job that this task runs."""
        return job_uuid_of(self.key)


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
        candidates = [astuple(key) for key in candidate_keys(job_uuid, self.dag_ids())]
        return self._find(tuple_(*place).in_(candidates)) if candidates else None

    def _find(self, condition: ColumnElement[bool]) -> JobTask | None:
        query = (
            select(TaskInstance, DagRun)
            .join(DagRun, and_(DagRun.dag_id == TaskInstance.dag_id, DagRun.run_id == TaskInstance.run_id))
            .where(TaskInstance.operator.in_(TRAINING_OPERATORS), condition)
        )
        with _database(), create_session() as session:
            row = session.execute(query).first()
            return _job_task(*row) if row is not None else None

    def job_uuids(self, dag_ids: Collection[str]) -> list[str]:
        """Return the ids of all jobs of these DAGs, newest first."""
        columns = (TaskInstance.dag_id, TaskInstance.run_id, TaskInstance.task_id, TaskInstance.map_index)
        query = (
            select(*columns)
            .join(DagRun, and_(DagRun.dag_id == TaskInstance.dag_id, DagRun.run_id == TaskInstance.run_id))
            .where(TaskInstance.operator.in_(TRAINING_OPERATORS), TaskInstance.dag_id.in_(dag_ids))
            .order_by(DagRun.run_after.desc(), DagRun.id.desc(), TaskInstance.task_id, TaskInstance.map_index)
        )
        with _database(), create_session() as session:
            return [job_uuid_of(TaskKey(*row)) for row in session.execute(query)]

    def dag_ids(self) -> set[str]:
        """Return the DAGs that have training tasks or take requests."""
        query = select(TaskInstance.dag_id).where(TaskInstance.operator.in_(TRAINING_OPERATORS)).distinct()
        with _database(), create_session() as session:
            return set(REQUEST_DAGS) | set(session.scalars(query))

    def cancel(self, key: TaskKey) -> None:
        """Fail the job's task, which ends it if it runs; other tasks of a larger DAG go their own way.

        :raises JobNotFoundError: if the run is gone.
        """
        with _database(), create_session() as session:
            run = _dag_run(session, key)
            dag = DBDagBag().get_dag_for_run(run, session=session)
            if dag is None:
                raise RecordUnavailableError(f"Airflow cannot read the DAG {key.dag_id!r}")
            if key.dag_id in REQUEST_DAGS:
                patch_dag_run_state(dag=dag, dag_run=run, state=DagRunMutableStates.FAILED, session=session)
                return
            dag.set_task_instance_state(
                task_id=key.task_id,
                map_indexes=None if key.map_index < 0 else [key.map_index],
                run_id=key.run_id,
                state=TaskInstanceState.FAILED,
                session=session,
            )

    def log_lines(self, task: JobTask) -> list[str]:
        """Return the lines of the task's log over all attempts, oldest first."""
        reader = TaskLogReader()
        lines: list[str] = []
        with _database(), create_session() as session:
            instance = session.scalar(_instance_query(task.key))
            if instance is None:
                raise JobNotFoundError(task.job_uuid)
            for attempt in range(1, task.attempt + 1):
                messages, _ = reader.read_log_chunks(instance, attempt, metadata={"end_of_log": False})
                lines.extend(line for message in messages if (line := _event(message)))
        return lines


def team_of(dag_id: str) -> str | None:
    """Return the team that a DAG belongs to, None without teams."""
    with _database():
        return DagModel.get_team_name(dag_id)


@contextmanager
def _database() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise RecordUnavailableError(f"Airflow's database is busy: {error.orig}") from error


def _dag_run(session: Session, key: TaskKey) -> DagRun:
    query = select(DagRun).where(DagRun.dag_id == key.dag_id, DagRun.run_id == key.run_id)
    run: DagRun | None = session.scalar(query)
    if run is None:
        raise JobNotFoundError(job_uuid_of(key))
    return run


def _instance_query(key: TaskKey) -> Any:
    return select(TaskInstance).where(
        TaskInstance.dag_id == key.dag_id,
        TaskInstance.run_id == key.run_id,
        TaskInstance.task_id == key.task_id,
        TaskInstance.map_index == key.map_index,
    )


def _job_task(task: TaskInstance, run: DagRun) -> JobTask:
    return JobTask(
        key=TaskKey(task.dag_id, task.run_id, task.task_id, task.map_index),
        state=str(task.state) if task.state is not None else None,
        attempt=task.try_number,
        scheduled_at=run.queued_at,
        started_at=task.start_date,
        ended_at=task.end_date,
        conf=dict(run.conf or {}),
    )


def _event(message: Any) -> str:
    """Return the text of one structured log message."""
    event = getattr(message, "event", message)
    return str(event)
