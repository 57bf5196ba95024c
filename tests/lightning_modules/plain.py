"""The optimizer's part of a training loop, written out: what the trainer is compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch


def plain_steps(model: Any, *, lr: float, weight_decay: float, steps: int) -> Iterator[int]:
    """Yield each step's number; when the loop goes on, AdamW has applied the gradients of that step.

    The rate warms up over two steps and then decays as a cosine; vectors have no weight decay.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}], lr=lr
    )
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 1)))
            group["lr"] = lr * (step / 2 if step <= 2 else decay)
        yield step
        optimizer.step()
        optimizer.zero_grad()
