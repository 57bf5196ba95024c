"""Optimizers and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from post_training.schemas.training import OptimizerConfig, OptimizerType

WARMUP_FRACTION = 0.1
"""Share of all steps that warms up where the request has no optimizer_config."""

OPTIMIZERS: Mapping[OptimizerType, Callable[..., torch.optim.Optimizer]] = {
    OptimizerType.adam: torch.optim.Adam,  # its weight decay is an L2 penalty
    OptimizerType.adamw: torch.optim.AdamW,
    OptimizerType.sgd: torch.optim.SGD,
}


def default_optimizer(learning_rate: float, steps_total: int) -> OptimizerConfig:
    """Return AdamW without weight decay, a tenth of the steps warming up."""
    return OptimizerConfig(
        optimizer_type=OptimizerType.adamw,
        lr=learning_rate,
        weight_decay=0.0,
        num_warmup_steps=math.ceil(WARMUP_FRACTION * steps_total),
    )


def make_optimizer(parameters: Iterable[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make the optimizer; weight decay acts on matrices only, not on norms, biases and magnitudes."""
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    divided = any(isinstance(parameter, DTensor) for parameter in trained)
    fused = not divided or config.optimizer_type is not OptimizerType.sgd  # torch 2.13 divides no fused SGD
    return OPTIMIZERS[config.optimizer_type](groups, lr=config.lr, fused=fused)


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


DECAYS: Mapping[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}
"""Factor of the peak rate after the warm-up, by the share of the decay that is over, in [0, 1)."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate by optimizer step.

    :param peak: rate at the end of the warm-up.
    :param warmup: steps that warm up.
    :param total: steps of the whole job.
    :param decay: a key of ``DECAYS``.
    """

    peak: float
    warmup: int
    total: int
    decay: str

    def rate(self, step: int) -> float:
        """Return the rate of a step, counted from 1.

        Step k of n warm-up steps has ``peak · k / n``. The peak is at step n (at step 1 without a
        warm-up); from there the rate falls so that it would be 0 one step after the last: no step
        is spent on a rate of 0, and a job of one step trains.
        """
        if step < self.warmup:
            return self.peak * step / self.warmup
        first = max(self.warmup, 1)
        return self.peak * DECAYS[self.decay]((step - first) / max(self.total - first + 1, 1))
