"""How long a trainer takes from its start to its first step, with a real MLflow server.

Its libraries and the model are in the memory of the machine already, for other trainers have read them.
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

STARTS = 3


def start_up(model: Path, data: Path, tracking_uri: str, folder: Path) -> dict[str, float]:
    """Return the seconds until the first step begins and until it has ended, medians."""
    task = Task("sft", str(model), str(data), 8, 8, "qv", {"tracking_uri": tracking_uri, "rounds": 1})
    starts = []
    for number in range(STARTS):
        work_dir = folder / f"start-{number}"
        work_dir.mkdir(parents=True)
        starts.append(_start(task, work_dir))
    return {name: statistics.median(one[name] for one in starts) for name in ("begins", "ends")}


def _start(task: Task, folder: Path) -> dict[str, float]:
    spec = folder / SPEC_FILE
    spec.write_text(specification(task, folder).model_dump_json())
    started = time.time()
    ended = subprocess.run(
        trainer_argv(sys.executable, spec),
        env=trainer_environment(os.environ, {}),
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        raise RuntimeError(ended.stderr[-3000:])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (step,) = (metric for metric in map(json.loads, lines) if "tokens_per_second" in metric.get("values", {}))
    ends, values = step["time"] / 1000 - started, step["values"]
    return {"begins": ends - values["tokens_seen"] / values["tokens_per_second"], "ends": ends}
