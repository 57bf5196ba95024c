"""Trainers on the devices of this machine: ``python -m lightning_modules.elastic /path/to/spec.json``.

torchrun, as a library, starts one process for each device and ends the others where one fails. Processes that
were killed are started again, a few times, and go on from the newest state. They are started afresh: after a
restart within one torchrun processes over gloo were seen to wait for each other forever.

Exit codes are those of :mod:`lightning_modules.train`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import psutil  # type: ignore[import-untyped]
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lightning_modules.process import EXIT_COMPLETED, EXIT_FAILED, describe, is_permanent, spec_file
from lightning_modules.process_group import check_devices, devices_here
from lightning_modules.train import EXIT_STOPPED, LAUNCHER, failure_file, write_result
from post_training.schemas.trainer import RESULT_FILE, TrainerResult, TrainerSpec

TRAINER = "lightning_modules.train"

RESTARTS = 3
"""Times that trainers which were killed are started again."""

GRACE_SECONDS = 10
"""Between SIGTERM and SIGKILL for those that are left when one has failed."""

SIGTERM_SECONDS = 0.5
"""Between two of the signals by which they are asked to stop: one may come before they can take it."""


def main(argv: Sequence[str] | None = None, trainer: str = TRAINER) -> int:
    """Train what a spec file describes; return the exit code.

    :param trainer: the module that each process runs.
    """
    path = spec_file("lightning_modules.elastic", argv)
    if path is None:
        return EXIT_FAILED
    stop = Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: stop.set())
    spec: TrainerSpec | None = None
    try:
        spec = TrainerSpec.model_validate_json(path.read_bytes())
        check_devices(spec.request.devices)
        return Launch(spec, path, trainer, stop).run()
    except Exception as error:
        failed = TrainerResult(status="failed", error=describe(error), permanent=is_permanent(error))
        return _leave(path.parent if spec is None else spec.work_dir, spec, failed)


def _leave(folder: Path, spec: TrainerSpec | None, result: TrainerResult) -> int:
    print(f"failed: {result.error}", file=sys.stderr)
    write_result(folder / RESULT_FILE, result, spec.attempt_id if spec is not None else "")
    return EXIT_FAILED


class Launch:
    """The processes of one attempt.

    :param stop: set when they are to stop.
    """

    def __init__(self, spec: TrainerSpec, path: Path, trainer: str, stop: Event) -> None:
        self._spec, self._path, self._trainer, self._stop = spec, path, trainer, stop
        self._devices = spec.request.devices
        self._code = EXIT_COMPLETED

    def run(self) -> int:
        """Run them to their end, started again where one is killed; return the exit code."""
        cores, what = devices_here()
        if what != "GPUs":
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // self._devices)))
        os.environ[LAUNCHER] = str(os.getpid())
        Thread(target=self._pass_on, daemon=True).start()
        for left in reversed(range(RESTARTS + 1)):
            killed = self._round()
            if self._stop.is_set() or killed is None:
                return self._end()
            print(f"{killed}; {left} restarts are left", file=sys.stderr)
        error = f"{killed}, after {RESTARTS} restarts; out of memory is a usual cause."
        return _leave(self._spec.work_dir, self._spec, TrainerResult(status="failed", error=error))

    def _pass_on(self) -> None:
        """Ask the processes to stop, when that is asked of this one."""
        self._stop.wait()
        while True:
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):  # it has ended since
                    child.terminate()
            Event().wait(SIGTERM_SECONDS)

    def _round(self) -> str | None:
        """Start the processes and wait for their end; say which was killed, None if none was."""
        logs = self._spec.work_dir / "torchrun"
        for rank in range(self._devices):
            self._failure(rank).unlink(missing_ok=True)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
            signals_to_handle="SIGHUP",  # SIGTERM is ours: torchrun would kill them after a while
            shutdown_timeout=GRACE_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)("-m", self._trainer, str(self._path))
        except ChildFailedError as error:
            self._code = error.get_first_failure()[1].exitcode
            killed = [(rank, -one.exitcode) for rank, one in error.failures.items() if one.exitcode < 0]
            return f"process {killed[0][0]} was killed by signal {killed[0][1]}" if killed else None
        finally:
            shutil.rmtree(logs, ignore_errors=True)
        return None

    def _end(self) -> int:
        """Return the exit code of processes of which none was killed; a failure of one is the job's."""
        result = self._read(self._spec.work_dir / RESULT_FILE)
        if result is not None and result.status == "completed":
            return EXIT_COMPLETED
        failures = sorted(filter(Path.exists, map(self._failure, range(self._devices))), key=_written)
        own = self._spec.work_dir / RESULT_FILE
        if failures and (result is None or _written(failures[0]) < _written(own)):
            # The first one tells of lost connections then, if of anything.
            result = self._read(failures[0])
        if result is None:  # they were asked to stop, or the first has seen that nobody wants them
            return EXIT_STOPPED if self._stop.is_set() else self._code
        write_result(own, result, self._spec.attempt_id)
        return EXIT_FAILED

    def _failure(self, rank: int) -> Path:
        return self._spec.work_dir / failure_file(rank)

    def _read(self, file: Path) -> TrainerResult | None:
        """Return what a process has left, if it was one of this attempt."""
        if not file.exists():
            return None
        result = TrainerResult.model_validate_json(file.read_bytes())
        return result if result.attempt_id == self._spec.attempt_id else None


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns


if __name__ == "__main__":
    sys.exit(main())
