"""Sequences in one row, by hand and for any set of sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.data.layout import MIN_SAVED, Segment, arrange


def sequences(*values: list[int]) -> list[np.ndarray]:
    return [np.array(value) for value in values]


STEM = list(range(100, 100 + MIN_SAVED))


def test_without_sharing_sequences_stand_behind_each_other() -> None:
    row = arrange(sequences([1, 2], [1, 2, 3]), share=False)
    assert row.input_ids.tolist() == [1, 2, 1, 2, 3]
    assert row.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert row.segments == (Segment((0, 2)), Segment((2, 5)))
    assert [places.tolist() for places in row.places] == [[0, 1], [2, 3, 4]]


def test_a_shared_beginning_stands_once() -> None:
    row = arrange(sequences([*STEM, 1, 2], [*STEM, 3]), share=True)
    stem = (0, MIN_SAVED)
    assert row.input_ids.tolist() == [*STEM, 1, 2, 3]
    assert row.position_ids.tolist() == [*range(MIN_SAVED), MIN_SAVED, MIN_SAVED + 1, MIN_SAVED]
    branches = [
        Segment((MIN_SAVED, MIN_SAVED + 2), (stem,)),
        Segment((MIN_SAVED + 2, MIN_SAVED + 3), (stem,)),
    ]
    assert row.segments == (Segment(stem), *branches)
    assert row.places[1].tolist() == [*range(MIN_SAVED), MIN_SAVED + 2]


def test_pairs_within_a_batch_share_twice() -> None:
    """A system prompt of all, and of each pair its own prompt."""
    first, second = [*STEM, *range(30, 50)], [*STEM, *range(50, 70)]
    row = arrange(sequences([*first, 1], [*first, 2], [*second, 3], [*second, 4]), share=True)
    assert row.input_ids.tolist() == [*STEM, *range(30, 50), 1, 2, *range(50, 70), 3, 4]
    assert [len(segment.before) for segment in row.segments] == [0, 1, 2, 2, 1, 2, 2]


def test_what_saves_little_is_not_shared() -> None:
    short = STEM[:-1]
    assert len(arrange(sequences([*short, 1], [*short, 2]), share=True).segments) == 2
    assert len(arrange(sequences([*short, 1], [*short, 2], [*short, 3]), share=True).segments) == 4


def test_equal_sequences_and_beginnings_of_others() -> None:
    row = arrange(sequences(STEM, STEM, [*STEM, 1]), share=True)
    assert row.input_ids.tolist() == [*STEM, 1]
    assert [len(places) for places in row.places] == [MIN_SAVED, MIN_SAVED, MIN_SAVED + 1]


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=6), st.integers(0, 40)
)
def test_every_sequence_is_its_path(tails: list[list[int]], shared: int) -> None:
    values = [np.array(([1, 2, 0] * 14)[:shared] + tail) for tail in tails]
    row = arrange(values, share=True)
    assert len(row.input_ids) <= sum(map(len, values))
    spans = [segment.span for segment in row.segments]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(row.input_ids)
    paths = {segment.span: [*segment.before, segment.span] for segment in row.segments}
    for value, places in zip(values, row.places, strict=True):
        assert row.input_ids[places].tolist() == value.tolist()
        assert row.position_ids[places].tolist() == list(range(len(value)))
        last = next(span for span in spans if span[0] <= places[-1] < span[1])
        assert [place for start, end in paths[last] for place in range(start, end)] == places.tolist()
