"""Attention in tiles against a dense mask, whatever the tree, the heads and the window."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_modules.data.layout import Segment
from lightning_modules.engine import attention, tiles
from lightning_modules.engine.attention import attend
from lightning_modules.engine.flex import flex_attend
from lightning_modules.engine.tiles import Layout, cut, group

MODULE: Any = SimpleNamespace()


class Shape(NamedTuple):
    """Heads, key heads, width of keys and of values."""

    heads: int = 4
    kv_heads: int = 2
    width: int = 8
    value_width: int = 8


STEM = Segment((0, 37))
TREE = [STEM, Segment((37, 90), (STEM.span,)), Segment((90, 91), (STEM.span,))]
TREE += [Segment((91, 123), ((0, 37), (37, 90))), Segment((123, 300), ((0, 37), (37, 90)))]
FLAT = [Segment((0, 1)), Segment((1, 150)), Segment((150, 157)), Segment((157, 158))]
LAYOUTS = {"tree": TREE, "flat": FLAT, "one": [Segment((0, 140))], "token": [Segment((0, 1))]}


def visible(segments: list[Segment], window: int | None) -> Tensor:
    """Which key each query sees, pair by pair (t, t)."""
    tokens = segments[-1].span[1]
    paths = {}
    for segment in segments:
        path = [place for start, end in (*segment.before, segment.span) for place in range(start, end)]
        paths |= {place: path[: path.index(place) + 1] for place in range(*segment.span)}
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for query, path in paths.items():
        seen[query, path[-window:] if window else path] = True
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, cap: float | None) -> Tensor:
    """Attention (1, h, t, d) as it is written, transposed to (1, t, h, e)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.mT * scale
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2)


def inputs(tokens: int, shape: Shape, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values as projections leave them: (1, t, h, d) transposed."""
    torch.manual_seed(0)
    sizes = ((shape.heads, shape.width), (shape.kv_heads, shape.width), (shape.kv_heads, shape.value_width))
    return [
        torch.randn(1, tokens, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads, width in sizes
    ]


def both(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients of two functions."""
    results = []
    for compute in (function, reference):
        output = compute(*leaves)
        upstream = torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype)
        results.append([output, *torch.autograd.grad(output, leaves, upstream)])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 20, 1000])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_tiles_equal_a_dense_mask(name: str, window: int | None, cap: float | None) -> None:
    segments = LAYOUTS[name]
    layout, seen = Layout(segments), visible(segments, window)
    options: dict[str, Any] = {"scaling": 0.7, "sliding_window": window, "softcap": cap, "layout": layout}

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(MODULE, q, k, v, None, **options)[0]

    for got, want in both(ours, lambda *t: dense(*t, seen, 0.7, cap), inputs(layout.tokens, Shape())):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_that_grows_with_the_square_of_the_length() -> None:
    kept: list[Tensor] = []
    layout = Layout.of_rows(1, 300)
    leaves = inputs(layout.tokens, Shape())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(MODULE, *leaves, None, layout=layout)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in leaves)


@pytest.mark.parametrize("shape", [Shape(3, 3), Shape(6, 1, 16), Shape(4, 2, 12, 20)])
def test_any_number_of_heads_and_widths(shape: Shape) -> None:
    layout, seen = Layout(TREE), visible(TREE, None)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(MODULE, q, k, v, None, layout=layout)[0]

    scale = shape.width**-0.5
    for got, want in both(ours, lambda *t: dense(*t, seen, scale, None), inputs(layout.tokens, shape)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_without_a_layout_each_row_is_alone() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 10, 8) for heads in (4, 2, 2))
    together = attend(MODULE, q, k, v, None)[0]
    seen = torch.ones(10, 10, dtype=torch.bool).tril()
    torch.testing.assert_close(together, dense(q, k, v, seen, 8**-0.5, None))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_flex_attention_sees_what_tiles_see(window: int | None, cap: float | None) -> None:
    layout = Layout(TREE)
    q, k, v = (tensor[0].detach() for tensor in inputs(layout.tokens, Shape()))
    options = attention.Options(0.7, window, cap)
    expected = dense(q[None], k[None], v[None], visible(TREE, window), 0.7, cap)[0].transpose(0, 1)
    found = flex_attend(q, k, v, layout, options)
    torch.testing.assert_close(found, expected)


def test_flex_attention_refuses_dropout() -> None:
    q, k, v = (tensor[0] for tensor in inputs(300, Shape()))
    with pytest.raises(NotImplementedError, match="no dropout"):
        flex_attend(q, k, v, Layout(TREE), attention.Options(1.0, dropout=0.1))


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    tokens, rate = 40, 0.25
    q, k, _ = inputs(tokens, Shape())
    values = torch.eye(tokens).expand(1, 2, -1, -1)  # the output is then the weights themselves
    options: dict[str, Any] = {"layout": Layout([Segment((0, tokens))])}
    weights = attend(MODULE, q, k, values, None, **options)[0]
    torch.manual_seed(1)
    noisy = torch.stack([attend(MODULE, q, k, values, None, dropout=rate, **options)[0] for _ in range(300)])
    lower = weights > 0
    assert float((noisy == 0)[:, lower].float().mean()) == pytest.approx(rate, abs=0.01)
    torch.testing.assert_close(noisy.mean(0), weights, rtol=0, atol=0.15)
    torch.manual_seed(2)
    output = attend(MODULE, q, k, values, None, dropout=rate, **options)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), [q])
    q, before = q.detach(), float(output.detach().square().sum())
    step = 1e-3
    for sign in (1, -1):
        torch.manual_seed(2)
        moved = attend(MODULE, q + sign * step * gradient, k, values, None, dropout=rate, **options)[0]
        change = float(moved.detach().square().sum()) - before
        assert change == pytest.approx(sign * step * float(gradient.square().sum()), rel=0.1)


def test_bf16_is_as_close_as_its_rounding() -> None:
    layout, seen = Layout(TREE), visible(TREE, None)
    leaves = inputs(layout.tokens, Shape(), torch.bfloat16)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(MODULE, q, k, v, None, layout=layout)[0]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q.float(), k.float(), v.float(), seen, 8**-0.5, None)

    for got, want in both(ours, exact, leaves):
        got, want = got.detach().float(), want.detach().float()
        assert float((got - want).norm() / want.norm()) < 0.01


def test_a_cache_and_a_mask_are_refused() -> None:
    q, k, v = inputs(6, Shape())
    with pytest.raises(ValueError, match="neither a cache nor a mask"):
        attend(MODULE, q[:, :, :1], k, v, None)
    with pytest.raises(ValueError, match="neither a cache nor a mask"):
        attend(MODULE, q, k, v, torch.ones(1, 1, 6, 6))


def test_a_window_leaves_out_what_no_query_sees() -> None:
    (tile,) = cut([Segment((50, 60), ((0, 20), (30, 50)))], window=25)
    assert (tile.position, tile.first, tile.keys) == (40, 16, ((16, 20), (30, 50), (50, 60)))
    assert tile.width == 34


def test_tiles_reach_up_to_their_own_queries_only() -> None:
    made = cut([Segment((0, 2 * tiles.QUERIES + 5))], None)
    assert [(tile.height, tile.width) for tile in made] == [(128, 128), (128, 256), (5, 261)]


@pytest.mark.parametrize("lengths", [[100] * 16, [10, 500, 60, 250, 250, 30, 400]])
def test_groups_pad_little_and_never_join_sequences(lengths: list[int]) -> None:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    segments = [Segment((end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    made = cut(segments, None)
    groups = group(made, None)
    assert sorted(tile.queries for g in groups for tile in g.tiles) == sorted(tile.queries for tile in made)
    computed = sum(len(g.tiles) * g.height * g.width for g in groups)
    wanted = sum(tile.height * tile.width for tile in made)
    assert computed <= tiles.SLACK * wanted
    assert computed < sum(lengths) ** 2 / 2
