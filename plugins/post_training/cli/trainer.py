"""The trainer process of a training in the terminal: shown while it runs, and stopped by Ctrl-C."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from post_training.cli.output import console
from post_training.cli.progress import shown
from post_training.job_lock import note_holder
from post_training.launch.local import trainer_of, worker_argv, worker_environment
from post_training.launch.process import WorkerProcess
from post_training.schemas.trainer import SPEC_FILE, TrainerSpec

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAVING = b"\nStopping: the state is saved after this step. Once more ends it at once.\n"


def run_trainer(spec: TrainerSpec, log: Path, lock: int) -> tuple[int, bool]:
    """Run the trainer to its end; return its exit code, and whether it was interrupted.

    Ctrl-C or SIGTERM asks it to save its state and end; the second one ends it at once.

    :param log: file that receives a copy of its output.
    :param lock: file descriptor by which the trainer holds its folder's lock.
    """
    stop = _Stop()
    with _handled(stop), shown(console(stderr=True)) as show:
        process = WorkerProcess(
            worker_argv(sys.executable, trainer_of(spec.request.devices), spec.work_dir / SPEC_FILE),
            worker_environment(os.environ, {}),
            log,
            pass_fds=(lock,),
            own_group=True,
            grace_seconds=math.inf,
        )
        try:
            stop.reach(process)
            note_holder(spec.work_dir, process.pid)
            for line in process.lines():
                show(line)
            return process.exit_code(), process.stopped
        finally:
            process.kill()


class _Stop:
    """Stops the trainer when it is called: first gently, then at once. A signal may come before it runs."""

    def __init__(self) -> None:
        self._calls = 0
        self._process: WorkerProcess | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == 1:
            os.write(2, _SAVING)  # print could be what the signal has interrupted
        self._pass_on()

    def reach(self, process: WorkerProcess) -> None:
        """Stop this process from now on, and now if that was asked for."""
        self._process = process
        self._pass_on()

    def _pass_on(self) -> None:
        if self._process is not None and self._calls:
            self._process.stop(at_once=self._calls > 1)


@contextmanager
def _handled(act: Callable[[], None]) -> Iterator[None]:
    """Act on Ctrl-C and SIGTERM instead of ending."""
    before = {number: signal.signal(number, lambda *_: act()) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
