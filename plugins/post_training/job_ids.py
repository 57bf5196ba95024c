"""A job's id and its place in Airflow: each follows from the other."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime

from post_training.schemas.record import REQUEST_TASK_ID
from post_training.schemas.requests import REQUESTS

MAY_BE_AN_ID = re.compile(r"[\w.~:+-]{1,1000}")
"""What is looked for at all. Names of DAGs and tasks may hold letters of any alphabet."""

_MAP_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")
_MAX_MAP_INDEX = 2**31 - 1

SEARCH_SUFFIX = "_search"

REQUEST_DAGS = frozenset(f"{method}{suffix}" for method in REQUESTS for suffix in ("", SEARCH_SUFFIX))
"""DAGs behind the HTTP API and the form: one run is one job. Those with a suffix search before they train."""


def request_dag(method: str, *, search: bool) -> str:
    """Return the DAG behind the HTTP API that runs a request."""
    return f"{method}{SEARCH_SUFFIX}" if search else method


PREFERENCE_OPERATOR = "PreferenceOptimizeOperator"
TRAINING_OPERATORS = ("SupervisedFineTuneOperator", PREFERENCE_OPERATOR)
"""Names by which the task-instance table knows the tasks that are jobs, also those of users' subclasses: its
``custom_operator_name``."""


SEARCH_OPERATORS = ("PlanSearchOperator", "SearchTrialsOperator")
"""Operators of the tasks in front of a job's that run its search."""


def plan_task_id(task_id: str) -> str:
    """Return the task that plans the search of a job's task."""
    return f"{_prefix(task_id)}plan"


def trials_task_id(task_id: str) -> str:
    """Return the mapped task that runs the trials of a job's task."""
    return f"{_prefix(task_id)}trials"


def _prefix(task_id: str) -> str:
    return "" if task_id == REQUEST_TASK_ID else f"{task_id}_"


def new_job_uuid(name: str, time: datetime) -> str:
    """Return an id for a job that was given none: a second call in the same second is another job."""
    return f"{name}-{time:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class TaskKey:
    """One task of one DAG run; ``map_index`` is -1 where the task is not mapped."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1


def job_uuid_of(key: TaskKey) -> str:
    """Return the id of the job that this task runs.

    In a request DAG it is the run's id; elsewhere ``{dag_id}.{run_id}.{task_id}``, and ``.{map_index}``
    behind it for a mapped task.
    """
    if key.dag_id in REQUEST_DAGS:
        return key.run_id
    mapped = "" if key.map_index < 0 else f".{key.map_index}"
    return f"{key.dag_id}.{key.run_id}.{key.task_id}{mapped}"


def candidate_keys(job_uuid: str, dag_ids: Collection[str]) -> Iterator[TaskKey]:
    """Yield every task of these DAGs, the request DAGs apart, whose job would have this id.

    Dots are allowed in all three names, so what follows the DAG's may be cut in several ways.
    """
    for dag_id in dag_ids:
        if dag_id in REQUEST_DAGS or not job_uuid.startswith(f"{dag_id}."):
            continue
        parts = job_uuid[len(dag_id) + 1 :].split(".")
        for cut in range(1, len(parts)):
            run_id = ".".join(parts[:cut])
            yield TaskKey(dag_id, run_id, ".".join(parts[cut:]))
            if len(parts) - cut > 1 and _is_map_index(parts[-1]):
                yield TaskKey(dag_id, run_id, ".".join(parts[cut:-1]), int(parts[-1]))


def _is_map_index(text: str) -> bool:
    """Whether it is a map index as ``job_uuid_of`` writes it, and one that Airflow's database can hold."""
    return _MAP_INDEX.fullmatch(text) is not None and int(text) <= _MAX_MAP_INDEX
