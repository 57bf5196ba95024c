"""One child process that is read line by line, stopped on request, and dies with its parent."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from post_training.parent_death import die_with

_POLL_SECONDS = 0.2
_LAST_LINES_SECONDS = 2.0
"""For which the output of a child that has ended is waited for: a process that it started may outlive it and
hold the pipe open."""


class WorkerProcess:
    """A child in the caller's process group, its output merged and read as lines.

    Airflow ends a task by SIGTERM to the whole process group and SIGKILL five seconds later, so the child
    has ``grace_seconds`` to end by itself. A terminal sends Ctrl-C to the whole group: where the caller is to
    decide what it means, the child has a group of its own.

    :param argv: the command.
    :param environment: all of its variables.
    :param log: file that receives a copy of the output.
    :param folder: its working folder; None is the caller's.
    :param pass_fds: file descriptors that it keeps open.
    :param own_group: whether it has a process group of its own.
    :param grace_seconds: time between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        folder: Path | None = None,
        pass_fds: Sequence[int] = (),
        own_group: bool = False,
        grace_seconds: float = 3.0,
    ) -> None:
        self._log = log
        self._grace_seconds = grace_seconds
        self._stopped_at: float | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(  # noqa: S603
            argv,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=pass_fds,
            process_group=0 if own_group else None,
            preexec_fn=die_with(os.getpid()),
        )
        self._reader = threading.Thread(target=self._read, name="trainer-output", daemon=True)
        self._reader.start()

    @property
    def stopped(self) -> bool:
        """Whether somebody asked it to stop."""
        return self._stopped_at is not None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def lines(self) -> Iterator[str]:
        """Yield the output until the child has ended, killing it when its grace is over."""
        ended = None
        while True:
            try:
                line = self._lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._process.poll() is not None:
                    ended = ended or time.monotonic()
                    if time.monotonic() - ended > _LAST_LINES_SECONDS:
                        break
                self._enforce_grace()
                continue
            if line is None:
                break
            yield line
            self._enforce_grace()
        while self._process.poll() is None:
            self._enforce_grace()
            time.sleep(_POLL_SECONDS)

    def exit_code(self) -> int:
        """Return the exit code once ``lines`` is exhausted; negative is the signal that ended it."""
        return self._process.wait()

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the child to end. Safe inside a signal handler: it sends a signal and waits for nothing.

        :param at_once: whether its grace is over.
        """
        if at_once:
            self._grace_seconds = 0.0
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            self._process.terminate()

    def kill(self) -> None:
        """End the child at once, and what it started, and wait for it."""
        self._kill_tree()
        self._process.wait()

    def _enforce_grace(self) -> None:
        if self._stopped_at is not None and time.monotonic() - self._stopped_at > self._grace_seconds:
            self._kill_tree()

    def _kill_tree(self) -> None:
        """Kill the child and its descendants, those in sessions of their own as well."""
        try:
            descendants = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            descendants = []
        self._process.kill()
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        with self._process.stdout as output:
            for line in output:
                self._copy(line)
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def _copy(self, line: str) -> None:
        """Append a line to the log, or do without where the disk refuses: the child waits for its reader."""
        with suppress(OSError), self._log.open("a", encoding="utf-8") as copy:
            copy.write(line)
