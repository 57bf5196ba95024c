"""Attention for packed rows that computes no block between two sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BY_SEQUENCE = "sdpa_by_sequence"
"""Name in transformers' table of attention functions; without a mask function: the layout is the mask."""

Layout = list[list[int]]
"""For each row of a packed batch, the lengths of its sequences; its padding is the last of them."""


def attend_by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Run causal attention on each sequence alone; without a layout, on each row.

    :param query: (b, heads, s, d); key and value have the same shape with their own number of heads.
    :returns: (b, s, heads, d), and None for the weights.
    """
    if layout is None:
        answer: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
        return answer
    rows = []
    for i, lengths in enumerate(layout):
        # split, not slices: its backward pass is one concatenation
        parts = [tensor.split(1)[i].split(lengths, dim=2) for tensor in (query, key, value)]  # type: ignore[no-untyped-call]
        outputs = [
            sdpa_attention_forward(module, q, k, v, None, **options)[0]
            for q, k, v in zip(*parts, strict=True)
        ]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


def use_by_sequence(model: PreTrainedModel, max_seq_length: int) -> bool:
    """Switch an sdpa model over, if its attention is plainly causal; return whether it was.

    Windows and chunks shorter than a sequence need their masks, and caps on the scores their own kernel.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not _plainly_causal(config, max_seq_length):
        return False
    AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
    model.set_attn_implementation(BY_SEQUENCE)
    return True


def _plainly_causal(config: PretrainedConfig, max_seq_length: int) -> bool:
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return all(limit is None or limit >= max_seq_length for limit in limits)
