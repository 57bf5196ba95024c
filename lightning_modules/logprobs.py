"""Log-probabilities of given tokens, without ever holding the logits of all of them.

The logits exist for a few rows at a time. Of a frozen head, whose gradient is not wanted, the forward pass
also takes each token's gradient for its hidden state, which the backward pass only has to scale.

In bf16 a logit of 30 is rounded by up to 0.06, and so is its token's log-probability: as much as a policy
differs from its reference early in training. Products in fp32 cost four times as much. But what is rounded
matters in proportion to its probability, so it is enough to compute the most probable tokens and the target
once more in fp32: of SmolLM2-135M on GSM8K that leaves a twentieth of the noise (0.0015 nats a token instead
of 0.029).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_modules.engine.norms import compute_dtype

CHUNK_LOGITS = 2**24
"""Logits that exist at once: 32 MiB in bf16. Fewer rows make slow products."""

BLOCK_LOGITS = 2**21
"""Logits that become probabilities at once: 8 MiB in fp32, which caches hold."""

CORRECTED = 16
"""The most probable tokens, whose logits are computed once more in fp32."""

MIN_ROWS = 64
"""Rows of a chunk at least, however large the vocabulary: fewer would only read the head's weight."""


@dataclass(frozen=True)
class Scaling:
    """What some architectures do between head and softmax, in this order.

    :param factor: multiplies: Cohere's ``logit_scale``, or one over Granite's ``logits_scaling``.
    :param cap: c maps x to c·tanh(x/c): Gemma 2's ``final_logit_softcapping``.
    """

    factor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Scaling:
        """Read it from a model's config."""
        factor = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls((1.0 if factor is None else factor) / (1.0 if divisor is None else divisor), cap)

    def apply(self, logits: Tensor) -> Tensor:
        """Scale logits."""
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


def scale_logits(logits: Tensor, config: Any) -> Tensor:
    """Apply what the architecture does between head and softmax: :class:`Scaling`."""
    return Scaling.of(config).apply(logits)


def chunk_rows(config: Any) -> int:
    """Return how many rows' logits may exist at once, by the ``vocab_size`` of the model's config."""
    return max(MIN_ROWS, CHUNK_LOGITS // int(config.vocab_size))


def token_log_probs(
    hidden: Tensor, targets: Tensor, head: nn.Module, config: Any, *, in_fp32: bool = True
) -> Tensor:
    """Compute each token's log-probability, in nats and fp32.

    :param hidden: hidden states (n, h); n may be 0.
    :param targets: token ids (n).
    :param head: output embedding, h -> v; its trained parameters get their gradients too. May not be sharded,
        nor, if ``in_fp32``, quantized.
    :param config: the model's config: ``vocab_size`` and the scalings of its logits.
    :param in_fp32: run a head that is more than a linear layer, such as an adapted one, in fp32. Of a linear
        one the type of its products rounds nothing that matters in either case.
    :returns: log-probabilities (n).
    """
    rows, scaling = chunk_rows(config), Scaling.of(config)
    if type(head) is nn.Linear:
        linear = LinearHead(scaling, rows, compute_dtype(head.weight))
        answer = _LinearLogProbs.apply(hidden, head.weight, head.bias, targets, linear)  # type: ignore[no-untyped-call]
        return cast(Tensor, answer)

    def of_chunk(states: Tensor, ids: Tensor) -> Tensor:
        logits = _run_in_fp32(head, states) if in_fp32 else head(states).float()
        return -functional.cross_entropy(scaling.apply(logits), ids, reduction="none")

    pieces = [
        cast(Tensor, checkpoint(of_chunk, states, ids, use_reentrant=False))
        for states, ids in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(pieces)


def _run_in_fp32(head: nn.Module, rows: Tensor) -> Tensor:
    weights = {name: parameter.float() for name, parameter in head.named_parameters()}
    with torch.autocast(rows.device.type, enabled=False):
        return cast(Tensor, functional_call(head, weights, (rows.float(),)))


class _LinearLogProbs(torch.autograd.Function):
    """log softmax(scaled(W h + b)) at the targets (n).

    Its gradient for the scaled logits is onehot(target) − p, with p the softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: LinearHead
    ) -> Tensor:
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        ctx.at_once = of_hidden and not (of_weight or of_bias)
        unit = torch.empty_like(hidden) if ctx.at_once else None
        found = torch.empty(len(hidden), device=hidden.device)
        for at, chunk in head.chunks(hidden, weight, bias, targets, gradients=ctx.at_once):
            found[at] = chunk.log_probs
            if unit is not None:
                unit[at] = chunk.of_hidden()
            del chunk  # before there is the next
        ctx.head = head
        ctx.save_for_backward(*((unit,) if unit is not None else (hidden, weight, bias, targets)))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.at_once:
            (unit,) = ctx.saved_tensors
            return (unit * upstream[:, None]).to(unit.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for at, chunk in ctx.head.chunks(hidden, weight, bias, targets, gradients=True):
            if of_hidden is not None:
                of_hidden[at] = chunk.of_hidden() * upstream[at, None]
            chunk.add_of_parameters(of_weight, of_bias, upstream[at, None])
            del chunk
        of_parameters = (None if g is None else g.to(weight.dtype) for g in (of_weight, of_bias))
        return of_hidden, *of_parameters, None, None


@dataclass(frozen=True)
class LinearHead:
    """How a linear output embedding is computed.

    :param scaling: of its logits.
    :param rows: whose logits exist at once.
    :param dtype: type of the products.
    """

    scaling: Scaling
    rows: int
    dtype: torch.dtype

    def chunks(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, gradients: bool
    ) -> Iterator[tuple[slice, _Chunk]]:
        """Yield places in (n) and what is computed for them.

        :param gradients: whether they will be asked for.
        """
        cast_weight = weight.to(self.dtype)
        for start in range(0, len(hidden), self.rows):
            at = slice(start, min(start + self.rows, len(hidden)))
            with torch.autocast(hidden.device.type, enabled=False):
                yield at, _Chunk(self, hidden[at], weight, cast_weight, bias, targets[at], gradients)


class _Chunk:
    """A few rows (m, h): their log-probabilities (m), and the gradients of those."""

    def __init__(
        self,
        head: LinearHead,
        hidden: Tensor,
        weight: Tensor,
        cast_weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        gradients: bool,
    ) -> None:
        self._factor, self._cap = head.scaling.factor, head.scaling.cap
        self._weight, self._targets = cast_weight, targets
        self._hidden = hidden if self._factor == 1.0 else hidden * self._factor
        self._bias = None if bias is None else bias * self._factor
        cast_bias = None if self._bias is None else self._bias.to(head.dtype)
        logits = functional.linear(self._hidden.to(head.dtype), cast_weight, cast_bias)
        self.log_probs = torch.empty(len(targets), device=hidden.device)
        self._of_targets = torch.empty(len(targets), 1, device=hidden.device)
        rows = max(1, BLOCK_LOGITS // logits.shape[1])
        for start in range(0, len(targets), rows):
            at = slice(start, start + rows)
            probabilities, capped = self._find(at, logits, weight)
            if gradients:
                self._differentiate(at, probabilities, capped, logits)
        self._of_others = logits

    def _find(self, at: slice, logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute some rows' log-probabilities; return all tokens' probabilities, and the capped logits."""
        capped = logits[at] if self._cap is None else self._capped(logits[at].float())
        probabilities = torch.softmax(capped, -1, dtype=torch.float32)
        normalizer = capped.amax(-1).float() - probabilities.amax(-1).log()
        targets = self._targets[at, None]
        of_targets = capped.gather(1, targets).float()
        if logits.dtype != torch.float32:
            ids = capped.topk(min(CORRECTED, logits.shape[1]), -1, sorted=False).indices
            exact = self._exact(at, ids, weight)
            normalizer = _correct(probabilities, ids, exact, normalizer)
            of_targets = self._exact(at, targets, weight)
        self.log_probs[at] = of_targets.squeeze(1) - normalizer
        return probabilities, capped

    def _differentiate(self, at: slice, probabilities: Tensor, capped: Tensor, logits: Tensor) -> None:
        """Write the gradient of some rows in the place of their logits; the target's stays in fp32, apart."""
        targets = self._targets[at, None]
        gradient = probabilities.neg_().scatter_add_(1, targets, torch.ones_like(probabilities[:, :1]))
        if self._cap is not None:
            gradient *= 1 - (capped / self._cap).square_()
        self._of_targets[at] = gradient.gather(1, targets)
        logits[at] = gradient.scatter_(1, targets, 0.0)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._cap is None else logits.div_(self._cap).tanh_().mul_(self._cap)

    def _exact(self, at: slice, ids: Tensor, weight: Tensor) -> Tensor:
        """Return the scaled logits of some tokens (m, k) in fp32."""
        logits = torch.einsum("mh,mkh->mk", self._hidden[at].float(), weight[ids].float())
        return self._capped(logits if self._bias is None else logits + self._bias[ids].float())

    def of_hidden(self) -> Tensor:
        """Return the gradient for the hidden states (m, h)."""
        of_others = (self._of_others @ self._weight).float()
        return of_others.addcmul_(self._of_targets, self._weight[self._targets].float()).mul_(self._factor)

    def add_of_parameters(self, of_weight: Tensor, of_bias: Tensor | None, upstream: Tensor) -> None:
        """Add the gradients for weight (v, h) and bias (v), given those of the log-probabilities (m, 1)."""
        dtype, given = self._of_others.dtype, upstream * self._hidden
        of_weight += self._of_others.T @ given.to(dtype)
        of_weight.index_add_(0, self._targets, self._of_targets * given.float())
        if of_bias is not None:
            of_others = (self._of_others.T @ upstream.to(dtype)).float()
            of_targets = of_others.index_add_(0, self._targets, self._of_targets * upstream)
            of_bias += of_targets.squeeze(1).mul_(self._factor)


def _correct(probabilities: Tensor, ids: Tensor, exact: Tensor, normalizer: Tensor) -> Tensor:
    """Give some tokens their exact logits, (m, k), in probabilities (m, v).

    :returns: the normalizer (m), log of the sum of exp, that then holds.
    """
    corrected = (exact - normalizer[:, None]).exp()
    change = (corrected - probabilities.gather(1, ids)).sum(-1)
    growth = torch.log1p(change)
    probabilities.scatter_(1, ids, corrected).mul_(torch.exp(-growth)[:, None])
    return normalizer + growth
