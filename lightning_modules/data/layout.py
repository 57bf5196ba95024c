"""Sequences of a micro-batch in one row without padding, where a beginning that several share stands once.

A causal model computes the same for equal beginnings, so the tokens are laid out as a tree (a radix tree,
https://en.wikipedia.org/wiki/Radix_tree): a segment attends to the segments before it on its path from the
root, and causally to itself. Sequences that share nothing are trees of one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

MIN_SAVED = 16
"""Tokens that sharing a beginning must save: each segment costs its own attention blocks."""

Span = tuple[int, int]
"""Places in the row: the first, and the one behind the last."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of the row that belong to the same sequences.

    :param span: where it stands.
    :param before: the spans that come before it in its sequences, from the root.
    """

    span: Span
    before: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Row:
    """A micro-batch in one row of t tokens.

    :param input_ids: (t).
    :param position_ids: of each token in its sequences (t).
    :param segments: every place is in one of them.
    :param places: for each sequence, the places of its tokens in their order.
    """

    input_ids: Ids
    position_ids: Ids
    segments: tuple[Segment, ...]
    places: list[Ids]


def arrange(sequences: Sequence[Ids], share: bool) -> Row:
    """Lay sequences out in one row.

    :param sequences: token ids, each at least one.
    :param share: let equal beginnings stand once.
    """
    writer = _Writer(sequences)
    members = list(range(len(sequences)))
    for group in [members] if share else [[member] for member in members]:
        writer.write(group, 0, ())
    return Row(
        np.concatenate(writer.ids),
        np.concatenate(writer.positions),
        tuple(writer.segments),
        [np.concatenate(places) for places in writer.places],
    )


@dataclass
class _Writer:
    sequences: Sequence[Ids]
    ids: list[Ids] = field(default_factory=list)
    positions: list[Ids] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    places: list[list[Ids]] = field(init=False)
    _length: int = 0

    def __post_init__(self) -> None:
        self.places = [[] for _ in self.sequences]

    def write(self, members: list[int], start: int, before: tuple[Span, ...]) -> None:
        """Write what follows ``start`` of sequences whose first ``start`` tokens stand in ``before``."""
        end = self._common(members, start)
        if (len(members) - 1) * (end - start) >= MIN_SAVED or len(members) == 1:
            before, start = self._append(members, start, end, before), end
        groups: dict[int, list[int]] = {}
        for member in members:
            sequence = self.sequences[member]
            following = int(sequence[end]) if end < len(sequence) else -1 - member  # what has ended is alone
            groups.setdefault(following, []).append(member)
        for group in groups.values():
            if any(len(self.sequences[member]) > start for member in group):
                self.write(group, start, before)

    def _common(self, members: list[int], start: int) -> int:
        """Return up to where the members are equal."""
        first = self.sequences[members[0]]
        end = len(first)
        for member in members[1:]:
            other = self.sequences[member]
            end = min(end, len(other))
            differing = np.flatnonzero(first[start:end] != other[start:end])
            if len(differing):
                end = start + int(differing[0])
        return end

    def _append(self, members: list[int], start: int, end: int, before: tuple[Span, ...]) -> tuple[Span, ...]:
        span = (self._length, self._length + end - start)
        self._length = span[1]
        self.ids.append(self.sequences[members[0]][start:end])
        self.positions.append(np.arange(start, end))
        self.segments.append(Segment(span, before))
        for member in members:
            self.places[member].append(np.arange(*span))
        return (*before, span)
