"""Which rows each of several processes takes."""

from __future__ import annotations

from itertools import chain

import pytest

from lightning_modules.data.share import WHOLE, Share


def test_a_process_alone_takes_all_in_their_order() -> None:
    assert WHOLE.micros(range(5), 2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("rows", range(1, 20))
@pytest.mark.parametrize(("devices", "world"), [(2, 2), (3, 3), (3, 2), (4, 1)])
def test_each_row_is_taken_once_in_as_many_micro_batches(rows: int, devices: int, world: int) -> None:
    taken = [Share(devices, rank, world).micros(range(rows), 2) for rank in range(world)]
    assert sorted(chain.from_iterable(chain.from_iterable(taken))) == list(range(rows))
    assert len({len(micros) for micros in taken}) == 1
    assert max(len(micro) for micros in taken for micro in micros) <= 2
    counts = [sum(map(len, micros)) for micros in taken]
    batches = -(-rows // (2 * devices))
    assert max(counts) - min(counts) <= batches, "neighbours, which are of like length, are divided evenly"


def test_the_last_row_leaves_a_process_without_any() -> None:
    assert Share(2, 0, 2).micros(range(5), 2) == [[0, 2], [4]]
    assert Share(2, 1, 2).micros(range(5), 2) == [[1, 3], []]


def test_fewer_processes_than_devices_take_more_micro_batches() -> None:
    assert Share(2, 0, 1).micros(range(4), 2) == [[0, 1], [2, 3]]
    assert Share(3).of_rank(2) == Share(3, rank=2)
