"""Norms that compute in fp32 and keep one tensor in the type of their result; the residual may be fp32."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightning_modules.engine.classes import derived

EPSILON_NAMES = ("variance_epsilon", "eps")

MIN_SCALE = 1e-3
"""Scales above it can be divided out of a result of any type."""


class RMSNorm(nn.Module):
    """``x / rms(x) · (offset + weight)`` in fp32, for classes of that formula: :func:`rms_norm_class`.

    Reference: Zhang and Sennrich, https://arxiv.org/abs/1910.07467, equation 4.
    """

    weight: nn.Parameter
    offset: ClassVar[float]
    epsilon_name: ClassVar[str]
    invertible: bool | None = None
    """Whether the frozen weight is nowhere near zero; None before the first call."""

    in_fp32 = False
    """Whether the result stays in fp32; otherwise it has the type in which the next layer multiplies."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize the last dimension: (…, h) -> (…, h)."""
        dtype = torch.float32 if self.in_fp32 else compute_dtype(self.weight)
        epsilon = getattr(self, self.epsilon_name)
        keep_result = self._keeps_result()
        answer = _RMSNorm.apply(hidden, self.weight, epsilon, self.offset, dtype, keep_result)  # type: ignore[no-untyped-call]
        return cast(Tensor, answer)

    def _keeps_result(self) -> bool:
        """Whether to keep the result for the gradient: adapters that follow keep it too.

        The compiler decides itself, and would compile a layer anew for each answer.
        """
        if torch.compiler.is_compiling() or self.weight.requires_grad:
            return False
        if self.invertible is None:
            self.invertible = bool((self.offset + self.weight.float()).abs().min() > MIN_SCALE)
        return self.invertible


class LayerNorm(nn.LayerNorm):
    """PyTorch's, computed in fp32 whatever the types of input and weights are."""

    in_fp32 = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the last dimensions: (…, h) -> (…, h)."""
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        answer = functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)
        like = input if self.weight is None else self.weight
        return answer if self.in_fp32 else answer.to(compute_dtype(like))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type in which layers multiply: autocast's, or that of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def rms_norm_class(module: nn.Module) -> type[nn.Module] | None:
    """Return a subclass of the module's class that computes the same by :class:`RMSNorm`.

    None if it computes something else, which is tried out.
    """
    own: Any = type(module)
    names = [name for name in EPSILON_NAMES if isinstance(getattr(module, name, None), float)]
    weight = dict(module.named_parameters()).get("weight")
    if "RMSNorm" not in own.__name__ or not names or weight is None or len(list(module.parameters())) != 1:
        return None
    sample = torch.linspace(-2, 3, 2 * weight.numel(), device=weight.device).sin().view(2, -1)
    with torch.no_grad():
        expected = module(sample).float()
        for offset in (0.0, 1.0):
            scale = (offset + weight.float()) * torch.rsqrt(
                sample.square().mean(-1, keepdim=True) + getattr(module, names[0])
            )
            if torch.allclose(sample * scale, expected, rtol=2e-2, atol=1e-3):
                return cast(type[nn.Module], derived(RMSNorm, own, offset=offset, epsilon_name=names[0]))
    return None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        epsilon: float,
        offset: float,
        dtype: torch.dtype,
        keep_result: bool,
    ) -> Tensor:
        wide = hidden.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        square = length.square_().div_(hidden.shape[-1]).add_(epsilon)
        inverse = square.rsqrt() + 0 * square  # what overflows is no number: as 0 it would look like health
        normed = wide * inverse
        result: Tensor = (normed * (weight.float() + offset)).to(dtype)
        ctx.save_for_backward(result if keep_result else normed.to(dtype), inverse, weight)
        ctx.offset, ctx.dtype, ctx.keep_result = offset, hidden.dtype, keep_result
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        kept, inverse, weight = ctx.saved_tensors
        scale = weight.float() + ctx.offset
        given, normed = upstream.float(), kept.float() / scale if ctx.keep_result else kept.float()
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (given * normed).flatten(0, -2).sum(0).to(weight.dtype)
        of_normed = given * scale
        along = (of_normed * normed).mean(-1, keepdim=True)
        of_hidden = of_normed.addcmul_(normed, along, value=-1).mul_(inverse)
        return of_hidden.to(ctx.dtype), of_weight, None, None, None, None
