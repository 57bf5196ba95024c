"""LoRA's update in the type of the base, with a backward pass by hand.

peft multiplies in the type of its adapters: in fp32 a copy of the input and several passes over the output.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_modules.engine.norms import compute_dtype


class Linear(lora.Linear):
    """peft's, with one adapter that is plain LoRA without dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute ``W x + (alpha / rank) · B A x``: (…, in_features) -> (…, out_features)."""
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        [name] = self.active_adapters
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        flat = x.reshape(-1, x.shape[-1])
        base = self.base_layer(flat)
        dtype = compute_dtype(base)
        answer = _Update.apply(base.to(dtype), flat.to(dtype), down, up, self.scaling[name])  # type: ignore[no-untyped-call]
        return cast(Tensor, answer).view(*x.shape[:-1], -1)


def use_fast_adapters(model: nn.Module) -> None:
    """Switch a model's plain LoRA layers over, in place; others, DoRA's among them, stay peft's."""
    if not isinstance(model, PeftModel):
        return
    for module in model.modules():
        if type(module) is lora.Linear and not module.lora_variant and _has_no_dropout(module):
            module.__class__ = Linear


def _has_no_dropout(module: lora.Linear) -> bool:
    return all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())


class _Update(torch.autograd.Function):
    """``base + scaling · B A x``: base (t, o), x (t, i), A (r, i), B (o, r)."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        down, up = down.to(x.dtype), (up * scaling).to(x.dtype)
        inner = x @ down.T
        ctx.save_for_backward(inner, down, up, x)
        ctx.scaling = scaling
        return torch.addmm(base, inner, up.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        inner, down, up, x = ctx.saved_tensors
        of_inner = upstream @ up
        of_x = of_inner @ down if ctx.needs_input_grad[1] else None
        of_down = (of_inner.T @ x).float()
        of_up = (upstream.T @ inner).float().mul_(ctx.scaling)
        return upstream, of_x, of_down, of_up, None
