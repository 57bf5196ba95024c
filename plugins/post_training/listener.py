"""Writes into MLflow at once that somebody has ended a job's task in Airflow's own pages.

A hint only, for whoever looks at MLflow: the truth is in Airflow's audit log, from which reads and the
``reconcile`` DAG mend the record as well.
"""

from __future__ import annotations

import logging
import threading
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

    if previous_state is not None or getattr(task_instance, "operator", None) not in TRAINING_OPERATORS:
        return
    ti = task_instance
    key = TaskKey(ti.dag_id, ti.run_id, ti.task_id, ti.map_index)
    threading.Thread(target=_cancel_record, args=(key, str(ti.id)), daemon=True).start()


def _cancel_record(key: Any, attempt_id: str) -> None:
    from post_training.job_ids import job_uuid_of  # noqa: PLC0415
    from post_training.operators.hooks import MLflowHook  # noqa: PLC0415
    from post_training.schemas.record import TAG_CANCELLED_ATTEMPT  # noqa: PLC0415
    from post_training.settings import load_settings  # noqa: PLC0415
    from post_training.tracking import OPEN  # noqa: PLC0415

    try:
        tracking = MLflowHook(load_settings().mlflow_conn_id).get_conn()
        run = tracking.find(job_uuid_of(key))
        if run is not None and run.status in OPEN:
            tracking.set_tags(run.run_id, {TAG_CANCELLED_ATTEMPT: attempt_id})
            tracking.set_status(run.run_id, "KILLED")
    except Exception as error:  # the next read mends the record
        logger.warning("the end of %s is not in MLflow yet: %s", job_uuid_of(key), error)
