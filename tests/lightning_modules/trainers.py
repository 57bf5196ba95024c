"""Trainer processes, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from post_training.schemas.trainer import RESULT_FILE, SPEC_FILE, TrainerResult, TrainerSpec
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SECONDS = 300


def write(spec: TrainerSpec) -> Path:
    """Write the spec into the job's folder, as an operator does; return the file."""
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    path = spec.work_dir / SPEC_FILE
    path.write_text(spec.model_dump_json(exclude_unset=True))
    return path


def result_of(spec: TrainerSpec) -> TrainerResult:
    """The result that the trainer left."""
    return TrainerResult.model_validate_json((spec.work_dir / RESULT_FILE).read_bytes())


def start(spec: TrainerSpec, **options: Any) -> subprocess.Popen[str]:
    """Start a trainer; with options, one that they make wait (see ``paused_trainer``)."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    module = "tests.lightning_modules.paused_trainer" if options else "lightning_modules.train"
    command = [sys.executable, "-m", module, str(write(spec)), *([json.dumps(options)] if options else [])]
    for mark in (".paused", ".go"):
        (spec.work_dir / SPEC_FILE).with_suffix(mark).unlink(missing_ok=True)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any]) -> None:
    """Wait until something is so while the trainer runs."""

    def holds() -> bool:
        assert process.poll() is None, process.communicate()[0]
        return bool(condition())

    wait_until(holds)


def wait_for_pause(process: subprocess.Popen[str], spec: TrainerSpec) -> None:
    """Wait until the trainer is at the step at which it pauses."""
    wait_for(process, (spec.work_dir / SPEC_FILE).with_suffix(".paused").exists)


def let_go(spec: TrainerSpec) -> None:
    """Let a trainer that pauses go on."""
    (spec.work_dir / SPEC_FILE).with_suffix(".go").touch()


def kill(process: subprocess.Popen[str]) -> str:
    """Kill a trainer without a warning; return its output."""
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return output


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a trainer's end and its exit code; return its output."""
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code, output
    return output
