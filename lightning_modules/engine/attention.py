"""Attention for rows without padding that computes no block between two sequences.

Registered in transformers' table of attention functions, so that every architecture that asks the table can
be trained with it. On a CPU the blocks of all sequences are batched GEMMs of few sizes with a backward pass
by hand: there neither a dense mask (which skips nothing) nor a call for each sequence is fast. On a GPU
FlexAttention skips the blocks that its mask empties: Dong et al., https://arxiv.org/abs/2412.05496 .
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface

from lightning_modules.engine.flex import flex_attend
from lightning_modules.engine.tiles import Heads, Layout, Plan

TREE = "post_training_tree"
"""Name in transformers' table; it has no mask function there: the layout is the mask."""


@dataclass(frozen=True)
class Options:
    """What attention does beside its products.

    :param scale: of the scores.
    :param window: positions that a query sees, itself included; None is all before it.
    :param cap: c bounds the scores to c·tanh(x/c): Gemma 2, https://arxiv.org/abs/2408.00118, section 2.
    :param dropout: share of the weights that are set to 0.
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    dropout: float = 0.0


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Run causal attention along the layout's paths; without a layout, on each row alone.

    :param query: (b, heads, s, d); key (b, kv_heads, s, d) and value (b, kv_heads, s, e) likewise; with a
        layout b is 1. Computed in the value's type: rotary embeddings may have left the others in fp32.
    :returns: (b, s, heads, e), and None for the weights.
    :raises ValueError: if there are keys of earlier calls, or a mask: generation takes another function.
    """
    rows, length = query.shape[0], query.shape[2]
    if key.shape[2] != length or attention_mask is not None:
        raise ValueError(f"{TREE} takes neither a cache nor a mask")
    layout = _layout_of_rows(rows, length) if layout is None else layout
    layout.windows.add(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = Options(scale, sliding_window, softcap, dropout)
    # (b, heads, s, d) -> (heads, b · s, d): without copying where b is 1
    q, k, v = (tensor.to(value.dtype).transpose(0, 1).flatten(1, 2) for tensor in (query, key, value))
    function: Callable[..., Tensor] = _TileAttention.apply if q.device.type == "cpu" else flex_attend
    output = function(q, k, v, layout, options)
    return torch.unflatten(output.transpose(0, 1), 0, (rows, length)), None


AttentionInterface.register(TREE, attend)


@lru_cache(maxsize=8)
def _layout_of_rows(rows: int, length: int) -> Layout:
    return Layout.of_rows(rows, length)


class _TileAttention(torch.autograd.Function):
    """softmax(scale · QKᵀ + mask) · V, tile by tile: (heads, t, d) -> (heads, t, e).

    The weights are computed again for the gradient: kept, they take more memory than all else in a layer but
    its gates, and grow with the square of the length. So does dropout's noise, which has to be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: Options
    ) -> Tensor:
        plan = layout.plan(options.window, Heads(len(query), len(key)), value.dtype)
        tiles = zip(plan.masks, *_gathered(plan, query, key, value), strict=True)
        ctx.plan, ctx.options, ctx.noises = plan, options, []
        outputs = []
        for mask, q, k, v in tiles:
            weights, _ = _weights(q, k, mask, options)
            noise = _noise(weights, options.dropout)
            outputs.append(torch.bmm(_times(weights, noise), v))
            ctx.noises.append(noise)
        ctx.save_for_backward(query, key, value)
        return _to_heads(_to_queries(plan, outputs), len(query))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        plan, options = ctx.plan, ctx.options
        # of padding the gradient is 0
        given = functional.pad(_to_rows(upstream), (0, 0, 0, 1)).index_select(0, plan.queries)
        upstreams = _by_group(given, plan.query_counts, plan.masks, dim=1)
        gathered = _gathered(plan, query, key, value)
        tiles = zip(plan.masks, ctx.noises, *gathered, upstreams, strict=True)
        of_query, of_key, of_value = [], [], []
        for mask, noise, q, k, v, of_output in tiles:
            weights, slope = _weights(q, k, mask, options)
            of_value.append(torch.bmm(_times(weights, noise).mT, of_output))
            of_weights = _times(torch.bmm(of_output, v.mT), noise)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_scores = _times(of_scores.mul_(options.scale), slope)
            of_query.append(torch.bmm(of_scores, k))
            of_key.append(torch.bmm(of_scores.mT, q))
        return (
            _to_heads(_to_queries(plan, of_query), len(query)),
            _to_heads(_to_keys(plan, of_key), len(key)),
            _to_heads(_to_keys(plan, of_value), len(key)),
            None,
            None,
        )


def _gathered(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], ...]:
    """Gather tensors (heads, t, d) for each group: queries (tiles · kv_heads, rows, d), keys and values."""
    queries = _to_rows(query).index_select(0, plan.queries_or_last)
    keys, values = (_to_rows(tensor).index_select(0, plan.keys) for tensor in (key, value))
    return (
        _by_group(queries, plan.query_counts, plan.masks, dim=1),
        _by_group(keys, plan.key_counts, plan.masks, dim=2),
        _by_group(values, plan.key_counts, plan.masks, dim=2),
    )


def _by_group(rows: Tensor, counts: list[int], masks: list[Tensor], dim: int) -> list[Tensor]:
    """Split gathered rows (n, d) into tiles whose number of rows is that of the mask's dimension ``dim``."""
    parts = torch.split(rows, counts)
    return [part.view(len(mask), mask.shape[dim], -1) for part, mask in zip(parts, masks, strict=True)]


def _to_rows(tensor: Tensor) -> Tensor:
    """(heads, t, d) -> (t · heads, d): of what the projections have made a view."""
    return tensor.transpose(0, 1).flatten(0, 1)


def _to_heads(rows: Tensor, heads: int) -> Tensor:
    """(t · heads, d) -> (heads, t, d)."""
    return torch.unflatten(rows, 0, (-1, heads)).transpose(0, 1)


def _to_queries(plan: Plan, tiles: list[Tensor]) -> Tensor:
    """Put what each tile has for its queries back into (t · heads, d)."""
    return torch.cat([tile.flatten(0, 1) for tile in tiles]).index_select(0, plan.back)


def _to_keys(plan: Plan, tiles: list[Tensor]) -> Tensor:
    """Sum what the tiles have for each key into (t · kv_heads, d), in fp32: a stem has many branches."""
    values = torch.cat([tile.flatten(0, 1) for tile in tiles])
    total = values.new_zeros(plan.tokens * plan.heads.keys, values.shape[1], dtype=torch.float32)
    return total.index_add_(0, plan.keys, values.float()).to(values.dtype)


def _weights(q: Tensor, k: Tensor, mask: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """Return attention weights (tiles · kv_heads, rows, keys), and the slope of the cap at their scores."""
    if options.cap is None:
        return torch.softmax(torch.baddbmm(mask, q, k.mT, alpha=options.scale), -1), None
    bounded = torch.bmm(q, k.mT).mul_(options.scale / options.cap).tanh_()
    slope = 1 - bounded.square()
    return torch.softmax(bounded.mul_(options.cap).add_(mask), -1), slope


def _noise(weights: Tensor, dropout: float) -> Tensor | None:
    if dropout == 0:
        return None
    return torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout)


def _times(tensor: Tensor, factor: Tensor | None) -> Tensor:
    return tensor if factor is None else tensor * factor
