"""Notes that somebody has ended a job's task in Airflow's own pages: such a job was cancelled.

First in Airflow's audit log, with the attempt that was meant, from which every read and the DAG ``reconcile``
mend the record; then in MLflow, for whoever looks there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from airflow.listeners import hookimpl

logger = logging.getLogger(__name__)


@hookimpl
def on_task_instance_failed(previous_state: Any, task_instance: Any, error: Any) -> None:
    """Cancel the record of a task that was set to failed by hand."""
    _set_by_hand(previous_state, task_instance)


@hookimpl
def on_task_instance_success(previous_state: Any, task_instance: Any) -> None:
    """Cancel the record of a task that was set to success by hand before its training was done."""
    _set_by_hand(previous_state, task_instance)


@hookimpl
def on_task_instance_skipped(previous_state: Any, task_instance: Any) -> None:
    """Cancel the record of a task that was set to skipped by hand."""
    _set_by_hand(previous_state, task_instance)


def _set_by_hand(previous_state: Any, task_instance: Any) -> None:
    """Start writing, where the api-server changed the state for a user: a worker names the state before."""
    from post_training.job_ids import TRAINING_OPERATORS, TaskKey  # noqa: PLC0415 - pydantic

    operator_name = getattr(task_instance, "operator_name", None)
    if previous_state is not None or operator_name not in TRAINING_OPERATORS:
        return
    ti = task_instance
    key = TaskKey(ti.dag_id, ti.run_id, ti.task_id, ti.map_index)
    threading.Thread(target=_note, args=(key, str(ti.id)), daemon=True).start()


def _note(key: Any, attempt_id: str) -> None:
    from post_training.airflow_runs import AirflowRuns  # noqa: PLC0415
    from post_training.job_ids import job_uuid_of  # noqa: PLC0415

    notes: tuple[Callable[[], None], ...] = (
        lambda: AirflowRuns().note_stop(key, attempt_id),
        lambda: _cancel_record(job_uuid_of(key), attempt_id),
    )
    for note in notes:
        try:
            note()
        except Exception as error:  # the other one is enough
            logger.warning("that %s was stopped is not noted everywhere: %s", job_uuid_of(key), error)


def _cancel_record(job_uuid: str, attempt_id: str) -> None:
    from post_training.operators.hooks import MLflowHook  # noqa: PLC0415
    from post_training.schemas.record import TAG_ATTEMPT_ID, TAG_CANCELLED_ATTEMPT  # noqa: PLC0415
    from post_training.settings import load_settings  # noqa: PLC0415
    from post_training.tracking import OPEN  # noqa: PLC0415

    tracking = MLflowHook(load_settings().mlflow_conn_id).get_conn()
    run = tracking.find(job_uuid)
    if run is not None and run.status in OPEN and run.tags.get(TAG_ATTEMPT_ID, "") <= attempt_id:
        tracking.set_tags(run.run_id, {TAG_CANCELLED_ATTEMPT: attempt_id})
        tracking.set_status(run.run_id, "KILLED")
