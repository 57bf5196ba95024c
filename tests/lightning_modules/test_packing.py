"""Best-fit rows, by hand and for any lengths."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.data.packing import pack


def test_pack_by_hand() -> None:
    assert pack([5, 3, 4, 2, 6], 10) == [[0, 1, 3], [2, 4]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
        pack([11], 10)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_pack_keeps_every_sequence_within_the_rows(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    half_empty = [row for row in rows if sum(lengths[i] for i in row) <= 10]
    assert len(half_empty) <= 1  # two of them would have been one
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
