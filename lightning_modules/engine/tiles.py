"""Which queries meet which keys: blocks of attention, in groups of like size for one batched GEMM each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_modules.data.layout import Segment, Span

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

QUERIES = 128
"""Queries of a tile at most: what lies above the diagonal of the last square is computed in vain."""

SLACK = 1.3
"""How much larger than its tiles a group may become by padding them to one size."""

GROUP_SCORES = 2**21
"""Scores of a group at most, per head."""


@dataclass(frozen=True)
class Tile:
    """Queries of one segment and the keys that they may see.

    :param queries: their span in the row.
    :param position: of the first query in its sequences.
    :param keys: spans in the row, in the order of the sequence; the last one ends with the queries.
    :param first: position of the first key.
    """

    queries: Span
    position: int
    keys: tuple[Span, ...]
    first: int

    @property
    def height(self) -> int:
        """Number of queries."""
        return self.queries[1] - self.queries[0]

    @cached_property
    def width(self) -> int:
        """Number of keys."""
        return sum(end - start for start, end in self.keys)


@dataclass(frozen=True)
class Group:
    """Tiles that are padded to one height and width and computed together.

    :param window: how many positions a query sees, itself included; None is all before it.
    """

    tiles: tuple[Tile, ...]
    window: int | None

    @cached_property
    def height(self) -> int:
        """Queries of the highest tile."""
        return max(tile.height for tile in self.tiles)

    @cached_property
    def width(self) -> int:
        """Keys of the widest tile."""
        return max(tile.width for tile in self.tiles)

    def mask(self, heads: Heads, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores, 0 or −∞: (tiles · kv_heads, repeats · height, width).

        A row that is padding sees the first key, so that its softmax is finite.
        """
        positions = torch.tensor([tile.position for tile in self.tiles])[:, None] + torch.arange(self.height)
        firsts = torch.tensor([tile.first for tile in self.tiles])[:, None]
        widths = torch.tensor([tile.width for tile in self.tiles])[:, None]
        keys = torch.arange(self.width)
        query, key = positions[:, :, None], (firsts + keys)[:, None, :]
        seen = (key <= query) & (keys < widths)[:, None, :]
        if self.window is not None:
            seen &= key > query - self.window
        seen[:, :, 0] |= ~seen.any(-1)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
        shape = (len(self.tiles), heads.keys, heads.repeats, self.height, self.width)
        return mask[:, None, None].expand(shape).flatten(0, 1).flatten(1, 2)

    def query_rows(self, heads: Heads, tokens: int) -> Tensor:
        """Return the rows of the queries in (tokens · heads, d), in the order of the mask's rows.

        Query heads that share a key head stand under each other. Padding is row ``tokens · heads``.
        """
        places = torch.full((len(self.tiles), self.height), tokens)
        for i, tile in enumerate(self.tiles):
            places[i, : tile.height] = torch.arange(*tile.queries)
        return _rows(places, torch.arange(heads.queries).view(heads.keys, heads.repeats), tokens)

    def key_rows(self, heads: Heads, tokens: int) -> Tensor:
        """Return the rows of the keys in (tokens · kv_heads, d), likewise; padding is row 0, never seen."""
        places = torch.zeros((len(self.tiles), self.width), dtype=torch.long)
        for i, tile in enumerate(self.tiles):
            places[i, : tile.width] = torch.cat([torch.arange(*span) for span in tile.keys])
        return _rows(places, torch.arange(heads.keys)[:, None], tokens)


class Heads(NamedTuple):
    """How many heads the queries have, and how many the keys: a multiple of them."""

    queries: int
    keys: int

    @property
    def repeats(self) -> int:
        """Query heads that share a key head."""
        return self.queries // self.keys


def _rows(places: Tensor, heads: Tensor, tokens: int) -> Tensor:
    """Return rows of (tokens · heads, d) for places (g, n) and heads (k, r), in the order (g, k, r, n)."""
    rows = places[:, None, None, :] * heads.numel() + heads[None, :, :, None]
    return rows.clamp(max=tokens * heads.numel()).flatten()


class Plan:
    """How attention with so many heads gathers, masks and scatters: the same for every layer with a window.

    :param groups: the tiles.
    :param tokens: of the row.
    """

    def __init__(self, groups: Sequence[Group], tokens: int, heads: Heads, dtype: torch.dtype) -> None:
        self.tokens, self.heads = tokens, heads
        self.masks = [group.mask(heads, dtype) for group in groups]
        rows = [group.query_rows(heads, tokens) for group in groups]
        self.queries = torch.cat(rows)
        self.queries_or_last = self.queries.clamp(max=tokens * heads.queries - 1)
        self.query_counts = [len(part) for part in rows]
        back = torch.empty(tokens * heads.queries + 1, dtype=torch.long)
        back[self.queries] = torch.arange(len(self.queries))
        self.back = back[:-1]
        rows = [group.key_rows(heads, tokens) for group in groups]
        self.keys = torch.cat(rows)
        self.key_counts = [len(part) for part in rows]


class Layout:
    """How attention sees a row: its segments, and what is made of them once for all layers.

    :param segments: as of :class:`lightning_modules.data.layout.Row`.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self.tokens = max(segment.span[1] for segment in self.segments)
        self.windows: set[int | None] = set()
        """Windows that the layers of a model have asked for."""
        self.block_masks: dict[tuple[int | None, torch.device], BlockMask] = {}
        """What FlexAttention needs instead of plans, by window and device."""
        self._plans: dict[tuple[int | None, Heads, torch.dtype], Plan] = {}

    @classmethod
    def of_rows(cls, rows: int, length: int) -> Layout:
        """Return the layout of rows of one length each, one behind the other."""
        return cls([Segment((i * length, (i + 1) * length)) for i in range(rows)])

    def plan(self, window: int | None, heads: Heads, dtype: torch.dtype) -> Plan:
        """Return the plan of a layer; a window that the row does not feel is as none."""
        window = None if window is None or window >= self.tokens else window
        if (window, heads, dtype) not in self._plans:
            groups = group(cut(self.segments, window), window)
            self._plans[window, heads, dtype] = Plan(groups, self.tokens, heads, dtype)
        return self._plans[window, heads, dtype]


def cut(segments: Sequence[Segment], window: int | None) -> list[Tile]:
    """Cut segments into tiles; keys before the first query's window are left out."""
    tiles = []
    for segment in segments:
        start, end = segment.span
        depth = sum(last - first for first, last in segment.before)
        for low in range(start, end, QUERIES):
            high, position = min(low + QUERIES, end), depth + low - start
            first = 0 if window is None else max(0, position - window + 1)
            keys = _without_first((*segment.before, (start, high)), first)
            tiles.append(Tile((low, high), position, keys, first))
    return tiles


def _without_first(spans: Sequence[Span], count: int) -> tuple[Span, ...]:
    kept = []
    for start, end in spans:
        left_out = min(count, end - start)
        count -= left_out
        if start + left_out < end:
            kept.append((start + left_out, end))
    return tuple(kept)


def group(tiles: Sequence[Tile], window: int | None) -> list[Group]:
    """Bring tiles of like size together, largest first."""
    groups: list[Group] = []
    members: list[Tile] = []
    for tile in sorted(tiles, key=lambda tile: (tile.width, tile.height), reverse=True):
        together = [*members, tile]
        size = len(together) * max(t.height for t in together) * max(t.width for t in together)
        wanted = sum(t.height * t.width for t in together)
        if members and (size > SLACK * wanted or size > GROUP_SCORES):
            groups.append(Group(tuple(members), window))
            together = [tile]
        members = together
    return [*groups, Group(tuple(members), window)]
