"""Pure functions from hidden states and labels to losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightning_modules.data.tokenize import IGNORED

MAX_PERPLEXITY_LOG = 700.0
"""exp of more is infinite in a double, and an infinity cannot be stored in the record."""

CHUNK_LOGITS = 2**25
"""Logits that exist at once: 128 MiB in fp32."""


def scored_hidden(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the positions whose next token is scored.

    :param hidden: last hidden states (b, s, h).
    :param labels: token ids, -100 where not scored (b, s); the first column is never scored.
    :returns: hidden states (n, h) and the token ids that they predict (n).
    """
    targets = labels[:, 1:]
    scored = targets != IGNORED
    return hidden[:, :-1][scored], targets[scored]


def scale_logits(logits: Tensor, config: Any) -> Tensor:
    """Apply what some architectures do between head and softmax.

    :param logits: the head's output (n, v).
    :param config: the model's config: ``logit_scale`` (Cohere) multiplies, ``logits_scaling``
        (Granite) divides, ``final_logit_softcapping`` c (Gemma 2) maps x to c·tanh(x/c).
    """
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * (logits / cap).tanh()
    return logits


def chunk_rows(config: Any) -> int:
    """Return how many rows' logits may exist at once, by the ``vocab_size`` of the model's config."""
    return max(1, CHUNK_LOGITS // int(config.vocab_size))


def token_loss_sum(hidden: Tensor, targets: Tensor, head: nn.Module, config: Any) -> Tensor:
    """Sum the cross-entropy of the scored tokens, in nats, computed in fp32.

    The logits exist for a few rows at a time only: the gradient of each chunk is taken at once and
    kept instead of them.

    :param hidden: hidden states (n, h).
    :param targets: token ids (n).
    :param head: output embedding, h -> v.
    :returns: a scalar in fp32.
    """
    # In validation too a Function is told that parameters want gradients.
    trained = [p for p in head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []

    def chunk_loss(rows: Tensor, ids: Tensor) -> Tensor:
        logits = scale_logits(head(rows), config)
        return functional.cross_entropy(logits.float(), ids, reduction="sum")

    chunk = chunk_rows(config)
    total = _ChunkedSum.apply(chunk_loss, chunk, targets, hidden, *trained)  # type: ignore[no-untyped-call]
    return cast(Tensor, total)


class _ChunkedSum(torch.autograd.Function):
    """Sum a function over chunks of rows, with its gradients for the rows and for some parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
        targets: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        wanted = any(ctx.needs_input_grad)
        pieces: list[Tensor] = []
        sums = [torch.zeros_like(parameter) for parameter in parameters] if wanted else []
        for rows, ids in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            with torch.set_grad_enabled(wanted):
                rows = rows.detach().requires_grad_(wanted)
                loss = function(rows, ids)
            total += loss.detach()
            if wanted:
                of_rows, *of_parameters = torch.autograd.grad(loss, (rows, *parameters))
                pieces.append(of_rows)
                for kept, new in zip(sums, of_parameters, strict=True):
                    kept += new
        if wanted:
            ctx.save_for_backward(torch.cat(pieces), *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(upstream.to(grad.dtype) * grad for grad in ctx.saved_tensors)


def perplexity(loss: float) -> float:
    """Return exp(loss), capped where it would be infinite."""
    return math.exp(min(loss, MAX_PERPLEXITY_LOG))
