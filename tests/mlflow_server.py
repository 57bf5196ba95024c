"""A real MLflow server for tests and benchmarks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from post_training.standalone_layout import free_ports
from tests.waiting import answers, wait_until


class MLflowServer:
    """An ``mlflow server`` on loopback, in a process group of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), "--workers", "1", "--serve-artifacts"]
        self._command += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db"]
        self._command += ["--artifacts-destination", str(home / "artifacts")]
        self._environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    def start(self, timeout: float = 300.0) -> None:
        """Start it and wait until it answers; the port and the data are those of the last start."""
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, env=self._environment
            )
        wait_until(self._answers, timeout)
        for server in psutil.Process(self._process.pid).children():
            # What the command itself has started, and waits for: another start needs half the time.
            self._command, self._environment = server.cmdline(), server.environ()

    def stop(self) -> None:
        """Kill it, and everything that it started."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its whole process group."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.home / "server.log").read_text()
        return answers(f"{self.uri}/health")
