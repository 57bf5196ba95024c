"""How long a trainer takes from its start to its first step, with a real MLflow server.

Its libraries and the model are in the memory of the machine already, for other trainers have read them.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from benchmarks.contenders.ours import specification
from benchmarks.contenders.rounds import Task
from benchmarks.trainers import train

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
    spec, started = specification(task, folder), time.time()
    (step,) = (line for line in train(spec, folder) if "tokens_per_second" in line.get("values", {}))
    ends, values = step["time"] / 1000 - started, step["values"]
    return {"begins": ends - values["tokens_seen"] / values["tokens_per_second"], "ends": ends}
