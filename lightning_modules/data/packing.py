"""Several sequences share a row: best-fit-decreasing bins."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute sequences over rows so that few tokens of padding are left.

    Each sequence, longest first, goes to the fullest row that still has room for it.

    :param lengths: tokens of each sequence, none above ``capacity``.
    :param capacity: tokens of a row.
    :returns: the sequences' indices in each row, ascending; rows by their first index.
    :raises ValueError: if a sequence is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[index], -1))
        if at == len(free):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = free.pop(at)
        rows[row].append(index)
        insort(free, (room - lengths[index], row))
    return sorted(sorted(row) for row in rows)
