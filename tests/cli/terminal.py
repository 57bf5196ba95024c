"""The command line in processes of their own, which are signalled and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SECONDS = 300


def start(*arguments: object, trainer: str = "") -> subprocess.Popen[str]:
    """Start the command line in a process of its own.

    :param trainer: Python's list of the arguments with which another trainer reads the ``spec``.
    """
    lines = ["from post_training.cli import app, trainer"]
    if trainer:
        lines.append(f"trainer.worker_argv = lambda python, program, spec: [python, *{trainer}]")
    lines.append("app.app(prog_name='post-training')")
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def paused_at(step: int) -> str:
    """Return the arguments of the real trainer that waits at a step."""
    options = json.dumps({"pause_at": step})
    return f"['-m', 'tests.lightning_modules.paused_trainer', str(spec), {options!r}]"


def finished(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    """Wait for the end; return what was printed."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, err
    return out, err


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    """Wait until something is so while it runs."""

    def holds() -> bool:
        assert process.poll() is None, process.communicate()
        return bool(condition())

    wait_until(holds)
