"""Log-probabilities of given tokens, without a full logits tensor."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_modules.losses import chunk_rows, scale_logits


def token_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module, config: Any) -> Tensor:
    """Compute each token's log-probability, in nats and fp32.

    The head multiplies in fp32, outside of autocast, whatever the type of hidden states and weights: to
    round logits to bf16 alone is a noise of about 0.04 nats a token (SmolLM2-135M), as much as a policy
    differs from its reference early in training. The head may not be quantized or sharded.

    The logits exist for a few rows at a time only: the backward pass computes them again, for unlike
    in a sum the gradient that arrives differs from token to token.

    :param hidden: hidden states (n, h); n may be 0.
    :param targets: token ids (n).
    :param head: output embedding, h -> v; its trained parameters get their gradients too.
    :param config: the model's config: ``vocab_size`` and the scalings of its logits.
    :returns: log-probabilities (n).
    """

    def of_chunk(rows: Tensor, ids: Tensor) -> Tensor:
        logits = scale_logits(_run_in_fp32(head, rows), config)
        return -functional.cross_entropy(logits, ids, reduction="none")

    chunk = chunk_rows(config)
    pieces = [
        cast(Tensor, checkpoint(of_chunk, rows, ids, use_reentrant=False))
        for rows, ids in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.cat(pieces)


def _run_in_fp32(head: nn.Module, rows: Tensor) -> Tensor:
    weights = {name: parameter.float() for name, parameter in head.named_parameters()}
    with torch.autocast(rows.device.type, enabled=False):
        return cast(Tensor, functional_call(head, weights, (rows.float(),)))
