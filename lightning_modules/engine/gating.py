"""Gated feed-forward layers that keep their two inputs and none of what lies between.

Reference: Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202, equation 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightning_modules.engine.classes import derived

Forward = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]
"""Takes the gradient of the activation and its input."""

ACTIVATIONS: Mapping[str, tuple[Forward, Backward]] = {
    "silu": (functional.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (
        partial(functional.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "gelu": (functional.gelu, torch.ops.aten.gelu_backward),
}
PARTS = ("gate_proj", "up_proj", "down_proj")


class GatedMLP(nn.Module):
    """``down(act(gate(x)) · up(x))``; see :func:`gated_class`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    activation: ClassVar[str]

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each position: (…, h) -> (…, h)."""
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        return cast(Tensor, self.down_proj(_Gate.apply(gate, up, self.activation)))  # type: ignore[no-untyped-call]


def gated_class(module: nn.Module) -> type[nn.Module] | None:
    """Return a subclass of the module's class that computes the same by :class:`GatedMLP`.

    None if it computes something else, which is tried out.
    """
    own: Any = type(module)
    act = getattr(module, "act_fn", None)
    parts = [getattr(module, name, None) for name in PARTS]
    if act is None or not all(isinstance(part, nn.Linear) for part in parts):
        return None
    gate, up, down = cast(list[nn.Linear], parts)
    sample = torch.linspace(-2, 3, 2 * gate.in_features, device=gate.weight.device).sin().view(2, -1)
    sample = sample.to(gate.weight.dtype)
    with torch.no_grad():
        expected, given = module(sample), gate(sample)
        for name, (forward, _) in ACTIVATIONS.items():
            same_act = torch.equal(act(given), forward(given))
            if same_act and torch.equal(down(forward(given) * up(sample)), expected):
                return cast(type[nn.Module], derived(GatedMLP, own, activation=name))
    return None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        forward, _ = ACTIVATIONS[activation]
        return forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        forward, backward = ACTIVATIONS[ctx.activation]
        return backward(upstream * up, gate), forward(gate).mul_(upstream), None
