"""One training in a trainer process of its own, and what it records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from post_training.launch.local import TRAIN, worker_argv, worker_environment
from post_training.schemas.trainer import SPEC_FILE, TrainerSpec


def train(spec: TrainerSpec, work_dir: Path) -> list[dict[str, Any]]:
    """Run the trainer to its end; return what it recorded, line by line.

    :raises RuntimeError: with the end of its log, if it fails.
    """
    file, log = work_dir / SPEC_FILE, work_dir / "log"
    file.write_text(spec.model_dump_json())
    with log.open("w") as output:
        ended = subprocess.run(
            worker_argv(sys.executable, TRAIN, file),
            env=worker_environment(os.environ, {}),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if ended.returncode != 0:
        raise RuntimeError(log.read_text()[-3000:])
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
