"""The order of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from lightning_modules.data.loaders import epoch_order


def test_unshuffled_keeps_the_order() -> None:
    assert epoch_order([3, 1, 2, 5, 4], 2, shuffle=False, grouped=True, seed=[1, 3, 0]) == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_shuffled_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_order([1] * 50, 4, shuffle=True, grouped=True, seed=[seed, epoch, 0])

    first = order(1, 0)
    torch.manual_seed(99)
    assert order(1, 0) == first
    assert order(1, 1) != first
    assert order(2, 0) != first
    assert sorted(chain.from_iterable(first)) == list(range(50))


def test_shuffled_rows_of_like_length_meet() -> None:
    lengths = [1 + i * 7919 % 100 for i in range(256)]

    def padding(steps: Sequence[Sequence[int]]) -> int:
        return sum(
            max(lengths[i] for i in step) * len(step) - sum(lengths[i] for i in step) for step in steps
        )

    grouped = epoch_order(lengths, 8, shuffle=True, grouped=True, seed=[0, 0, 0])
    plain = epoch_order(lengths, 8, shuffle=True, grouped=False, seed=[0, 0, 0])
    assert padding(grouped) < padding(plain) / 5
    assert sorted(chain.from_iterable(plain)) == sorted(chain.from_iterable(grouped))
