"""How long a trainer takes from its start to its first step, with a real MLflow server.

The first start reads everything from the disk, the later ones are warm. Both steps train the same rows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contenders.ours import specification
from benchmarks.contenders.rounds import Task
from post_training.launch.local import trainer_argv, trainer_environment
from post_training.schemas.trainer import SPEC_FILE

STARTS, STEPS = 4, 2


def start_up(model: Path, data: Path, tracking_uri: str, folder: Path) -> dict[str, float]:
    """Return the seconds until the first step begins and until it has ended: of a first start, and warm."""
    task = Task("sft", str(model), str(data), 8, 8, "qv", {"tracking_uri": tracking_uri, "rounds": STEPS})
    starts = []
    for number in range(STARTS):
        work_dir = folder / f"start-{number}"
        work_dir.mkdir(parents=True)
        starts.append(_start(task, work_dir))
    return {"first": starts[0]["begins"]} | {
        name: statistics.median(one[name] for one in starts[1:]) for name in ("begins", "ends")
    }


def _start(task: Task, folder: Path) -> dict[str, float]:
    spec = folder / SPEC_FILE
    spec.write_text(specification(task, folder).model_dump_json())
    started = time.time()
    subprocess.run(
        trainer_argv(sys.executable, spec),
        env=trainer_environment(os.environ, {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [metric for metric in map(json.loads, lines) if "train_loss" in metric.get("values", {})]
    first, second = (metric["time"] / 1000 for metric in steps[:2])
    return {"begins": first - (second - first) - started, "ends": first - started}
