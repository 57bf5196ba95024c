"""The machine that figures are from."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from post_training.launch.local import worker_environment

LIBRARIES = ("torch", "transformers", "peft", "trl", "lightning", "mlflow")


def gemm_peak(size: int = 2048, repeats: int = 15) -> float:
    """Return the FLOP/s of a bf16 matrix product on this machine."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(repeats):
        started = perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)


def machine() -> dict[str, Any]:
    """Return where and when, and with which libraries."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": gpu or f"{os.cpu_count()} cores of {cpu}",
        "libraries": {name: version(name) for name in LIBRARIES},
        "allocator": worker_environment(os.environ, {}).get("LD_PRELOAD") or "glibc",
    }


def _lines(path: str) -> Sequence[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
