"""What the operators share that start a process on the worker: its output is the task's log."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.sdk import BaseOperator, BaseOperatorLink

from post_training.errors import TrainerError
from post_training.job_ids import TaskKey
from post_training.launch.local import worker_argv, worker_environment
from post_training.launch.process import WorkerProcess
from post_training.operators.hooks import MLflowHook
from post_training.operators.links import MLflowRunLink
from post_training.operators.patience import persist
from post_training.parent_death import bind_to_parent
from post_training.settings import load_settings
from post_training.tracking import Tracking

if TYPE_CHECKING:
    from airflow.sdk import Context

_T = TypeVar("_T")


class PermanentFailureError(TrainerError):
    """Another attempt would fail the same way, or is not wanted."""


class WorkerOperator(BaseOperator):
    """Runs one process after the other, each to its end; a task that is killed stops the one that runs.

    The task takes its slot from the pool of ``[post_training] pool``, is sent to its ``queue``, and gets a
    pod from its ``pod_template_file``; a mapped one (``partial().expand()``) must name all three itself.
    """

    operator_extra_links: Collection[BaseOperatorLink] = (MLflowRunLink(),)

    def __init__(self, **kwargs: Any) -> None:
        settings = load_settings()
        kwargs.setdefault("pool", settings.pool)
        if settings.queue is not None:
            kwargs.setdefault("queue", settings.queue)
        if settings.pod_template_file is not None:
            kwargs.setdefault("executor_config", {"pod_template_file": settings.pod_template_file})
        super().__init__(**kwargs)
        self.mlflow_run_url: str | None = None
        self._process: WorkerProcess | None = None
        self._stopped = False

    @cached_property
    def tracking(self) -> Tracking:
        """The tracking server that holds the record: the deployment's, where the API looks too."""
        return MLflowHook(load_settings().mlflow_conn_id).get_conn()

    def persist(self, call: Callable[..., _T], *args: Any) -> _T:
        """Call until MLflow, or a search's storage, answers, the time is over or the task is stopped.

        :raises RecordUnavailableError: if it does not.
        """
        return persist(lambda: call(*args), lambda: self._stopped)

    def on_kill(self) -> None:
        """Ask the process to end; ``execute`` goes on and sees it end."""
        self._stopped = True
        if self._process is not None:
            self._process.stop()

    def _run_process(
        self,
        program: str,
        spec: Path,
        log_file: Path,
        *,
        pass_fds: Sequence[int] = (),
        started: Callable[[int], None] | None = None,
        heard: Callable[[str], None] | None = None,
        watch: Callable[[WorkerProcess], None] | None = None,
    ) -> int:
        """Run one of our programs to its end, its output in the task's log; return its exit code.

        :param program: the module that reads ``spec``; it works in that file's folder.
        :param log_file: receives a copy of its output.
        :param pass_fds: file descriptors that it keeps open.
        :param started: called with its process id.
        :param heard: called with each line of its output.
        :param watch: called with it after each line of its output; may stop it.
        :raises TrainerError: if it was stopped.
        """
        try:
            self._process = WorkerProcess(
                worker_argv(load_settings().trainer_python, program, spec),
                worker_environment(os.environ, self.tracking.server.environment()),
                log_file,
                folder=spec.parent,
                pass_fds=pass_fds,
            )
            if started is not None:
                started(self._process.pid)
            if self._stopped:
                self._process.stop()
            for line in self._process.lines():
                self.log.info(line)
                if heard is not None:
                    heard(line)
                if watch is not None:
                    watch(self._process)
            code = self._process.exit_code()
        finally:
            if self._process is not None:
                self._process.kill()
        if self._stopped:
            raise TrainerError("The job was stopped.")
        return code


def bind_to_supervisor() -> None:
    """Let the task end with Airflow's supervisor, which alone could report it; a SIGKILL would part them."""
    runner = sys.modules.get("airflow.sdk.execution_time.task_runner")
    if hasattr(runner, "SUPERVISOR_COMMS"):
        bind_to_parent(signal.SIGTERM)


def task_key(context: Context) -> TaskKey:
    """Return the place of the task that runs."""
    ti = context["ti"]
    return TaskKey(ti.dag_id, ti.run_id, ti.task_id, ti.map_index if ti.map_index is not None else -1)


def work_dir_of(key: TaskKey) -> Path:
    """Return the folder of a task's work, shared by its attempts."""
    mapped = "" if key.map_index < 0 else f".{key.map_index}"
    return load_settings().home / "jobs" / key.dag_id / key.run_id / f"{key.task_id}{mapped}"
