"""How fast jobs of one kind were on this machine, kept for the estimates of later ones."""

from __future__ import annotations

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_modules.kept import Kept, digest_of, make
from lightning_modules.setting import Setting

KEPT = 5
"""Measurements that are kept, the newest."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Speed:
    """Tokens a second, padding left out.

    :param training: of optimizer steps.
    :param forward: of validation, and of a reference's log-probabilities; None was not measured.
    """

    training: float
    forward: float | None


class Speeds:
    """The newest speeds of jobs of one kind.

    :param file: JSON; missing or broken it holds none.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    @classmethod
    def of(cls, setting: Setting, kept: Kept, model: Sequence[str], length: int) -> Speeds:
        """Find those of jobs that compute the same way on a machine of this kind.

        :param model: what tells the base model from others.
        :param length: the longest sequence in tokens.
        """
        request, adapters = setting.spec.request, setting.spec.request.adapters
        algorithm = request.algorithm_config
        way = [
            request.method,
            None if algorithm is None else algorithm.model_dump(mode="json"),
            None if adapters is None else adapters.model_dump(mode="json"),
            setting.efficiency.model_dump(mode="json"),
            [setting.dtype, setting.runtime.attn_implementation, setting.reference_once],
            [length, setting.data.batch_size, bool(setting.data.packed)],
            *([[setting.ranks.world, setting.sharded]] if setting.ranks.world > 1 else []),
        ]
        digest = digest_of(list(model), way, machine(setting.device))
        return cls(kept.place("speeds", digest) / "measured.json")

    def median(self) -> Speed | None:
        """Return the median of what is kept; None where nothing is."""
        measured = self._read()
        if not measured:
            return None
        forward = [speed.forward for speed in measured if speed.forward is not None]
        training = statistics.median(speed.training for speed in measured)
        return Speed(training, statistics.median(forward) if forward else None)

    def add(self, speed: Speed) -> None:
        """Keep a measurement; of two jobs that end at the same moment one may be lost."""
        newest = [*self._read(), speed][-KEPT:]
        text = json.dumps([asdict(one) for one in newest])
        self._file.parent.mkdir(parents=True, exist_ok=True)
        make(self._file, partial(_write, text))

    def _read(self) -> list[Speed]:
        try:
            return [Speed(**one) for one in json.loads(self._file.read_text())]
        except (FileNotFoundError, ValueError, TypeError):
            return []


def _write(text: str, draft: Path) -> None:
    draft.write_text(text)


def machine(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Any]:
    """Return what of a machine decides how fast it trains: the device's name, and the threads of a CPU."""
    if device == "cuda":
        return [torch.cuda.get_device_name()]
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return [named[1] if named else platform.machine(), torch.get_num_threads()]


class Stopwatch(pl.Callback):
    """Measures an attempt's steps, but for the first, which warms up, and its forward passes.

    :param processes: that train, each with as many tokens as this one.
    """

    def __init__(self, clock: Clock = time.perf_counter, processes: int = 1) -> None:
        self._clock = clock
        self._processes = processes
        self._began = 0.0
        self._steps = 0
        self._training = self._forward = (0, 0.0)  # tokens, seconds

    def on_train_batch_start(self, *args: Any) -> None:
        """Begin a step."""
        self._began = self._clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step."""
        self._steps += 1
        if self._steps > 1:
            self._training = self._plus(self._training, sum(micro["tokens"] for micro in batch))

    def on_validation_batch_start(self, *args: Any) -> None:
        """Begin a forward pass."""
        self._began = self._clock()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count a forward pass."""
        self._forward = self._plus(self._forward, batch["tokens"])

    def on_predict_batch_start(self, *args: Any) -> None:
        """Begin a forward pass of the reference."""
        self._began = self._clock()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count it."""
        self._forward = self._plus(self._forward, batch["tokens"])

    def speed(self) -> Speed | None:
        """Return what was measured; None before the second step."""
        training = _rate(*self._training)
        return None if training is None else Speed(training, _rate(*self._forward))

    def _plus(self, so_far: tuple[int, float], tokens: int) -> tuple[int, float]:
        return so_far[0] + tokens * self._processes, so_far[1] + self._clock() - self._began


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None
