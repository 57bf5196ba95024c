"""Attention along a layout's paths by PyTorch's FlexAttention, for GPUs.

Reference: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html .
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

if TYPE_CHECKING:
    from lightning_modules.engine.attention import Options
    from lightning_modules.engine.tiles import Layout


def flex_attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: Options) -> Tensor:
    """Compute what the tiles on a CPU do: (heads, t, d) -> (heads, t, e).

    :raises NotImplementedError: for dropout, which FlexAttention lacks.
    """
    if options.dropout > 0:
        raise NotImplementedError("FlexAttention has no dropout")

    def capped(score: Tensor, *places: Tensor) -> Tensor:
        assert options.cap is not None  # noqa: S101 - not called otherwise
        return options.cap * torch.tanh(score / options.cap)

    function = _compiled() if query.device.type == "cuda" else flex_attention
    output = function(
        query[None],
        key[None],
        value[None],
        score_mod=None if options.cap is None else capped,
        block_mask=block_mask(layout, options.window, query.device),
        scale=options.scale,
        enable_gqa=len(query) != len(key),
    )
    return cast(Tensor, output)[0]


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """Return which blocks of keys each block of queries sees; layers share it."""
    known = layout.block_masks
    if (window, device) not in known:
        known[window, device] = _make_block_mask(layout, window, device)
    return known[window, device]


def _make_block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    number = {segment.span: i for i, segment in enumerate(layout.segments)}
    tokens = layout.tokens
    owner, position = torch.empty(tokens, dtype=torch.long), torch.empty(tokens, dtype=torch.long)
    sees = torch.eye(len(number), dtype=torch.bool)
    for i, segment in enumerate(layout.segments):
        depth, (start, end) = sum(b - a for a, b in segment.before), segment.span
        owner[start:end] = i
        position[start:end] = torch.arange(depth, depth + end - start)
        sees[i, [number[span] for span in segment.before]] = True
    owner, position, sees = (tensor.to(device) for tensor in (owner, position, sees))

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = sees[owner[q], owner[k]] & (position[k] <= position[q])
        return seen if window is None else seen & (position[k] > position[q] - window)

    return create_block_mask(visible, None, None, tokens, tokens, device=device)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
