"""A Ray cluster on loopback: a head that trains nothing, and nodes, a process group each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from post_training.standalone_layout import free_ports, is_free
from tests.ray_api import TOKEN
from tests.waiting import answers, wait_until

ROOT = Path(__file__).parents[1]
STORE = 80 * 2**20
"""Bytes of each node's object store, the least that Ray takes."""

STARTS = 5
"""How often a head is started that ends by itself."""


class RayCluster:
    """A cluster with token authentication, in a folder with a short name: it is part of sockets' paths."""

    def __init__(self, dashboard: int) -> None:
        """Lay out a cluster.

        :param dashboard: port of the Jobs API.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))
        self.port, self._client_port = free_ports(2)
        self.dashboard = dashboard
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self._groups: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the head, and wait until all of it answers.

        Its servers wait half a minute for each other, too short on a busy machine; then all of them end.
        """
        ports = {
            "port": self.port,
            "dashboard-port": self.dashboard,
            "ray-client-server-port": self._client_port,
        }
        options = [f"--{name}={port}" for name, port in ports.items()]
        for _ in range(STARTS):
            self._start("head", ["--head", "--num-cpus=0", *options])
            if wait_until(self._outcome) == "answers":
                return
            self.kill("head")
            shutil.rmtree(self.folder / "head")
        raise AssertionError((self.folder / "head.log").read_text())

    def add(self, name: str, devices: int = 1) -> None:
        """Start a node with so many devices."""
        self._start(name, [f"--address=127.0.0.1:{self.port}", f"--num-cpus={devices}"])

    def home(self, name: str) -> Path:
        """Return a node's folder for jobs' working files, which no other node uses."""
        return self.folder / name / "home"

    @property
    def nodes(self) -> list[str]:
        """The nodes that run, the head among them."""
        return list(self._groups)

    def commands(self) -> list[str]:
        """The command of each process that runs on the nodes."""
        found = []
        for node in self._groups.values():
            for process in psutil.Process(node.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    found.append(" ".join(process.cmdline()))
        return found

    def kill(self, name: str) -> None:
        """Kill a node, with all that runs on it, at once."""
        process = self._groups.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Kill all nodes, and leave nothing."""
        for name in [*self._groups]:
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, options: list[str]) -> None:
        folder = self.folder / name
        folder.mkdir()
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        command += [f"--temp-dir={folder}", f"--object-store-memory={STORE}", "--node-ip-address=127.0.0.1"]
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, [ROOT / "plugins", ROOT])),
            "POST_TRAINING_HOME": str(self.home(name)),
            "RAY_worker_niceness": "0",  # beside other tests, nice trainers would hardly run
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            self._groups[name] = subprocess.Popen(
                [*command, *options], stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def _outcome(self) -> str:
        """Say what became of the head's start; empty is nothing yet."""
        if self._groups["head"].poll() is not None:
            return "ended"
        listens = not is_free(self._client_port)
        return "answers" if listens and answers(f"{self.address}/api/version", headers=HEADERS) else ""


HEADERS = {"Authorization": f"Bearer {TOKEN}"}
