"""How many tokens are foreseen, and whether they are counted or stand for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lightning_modules.data.batches import Arrangement
from lightning_modules.data.loaders import StepLoader, epoch_order
from lightning_modules.workload import Largest, Workload, tokens_of, workload_of

LENGTHS = [3, 5, 2, 4, 6]


@dataclass
class Lengths:
    """A shard of which the lengths are known."""

    lengths: Sequence[int]


@dataclass
class Known:
    """A data set's shards; those behind ``made`` may not be asked for."""

    of_shards: Sequence[Sequence[int]]
    made: int

    @property
    def counts(self) -> list[int]:
        return list(map(len, self.of_shards))

    @property
    def all_made(self) -> bool:
        return self.made == len(self.of_shards)

    def __getitem__(self, number: int) -> Lengths:
        assert number < self.made, "it would be tokenized now"
        return Lengths(self.of_shards[number])


def known(*of_shards: Sequence[int], made: int | None = None) -> Any:
    return Known(of_shards, len(of_shards) if made is None else made)


def loader(shards: Any, arrangement: Arrangement = Arrangement.TREE, **changes: Any) -> StepLoader:
    options = {"batch_size": 2, "accumulation": 1, "shuffle": False, "seed": 3, "steps_per_epoch": None}
    made = StepLoader(shards, pad_id=0, **(options | changes))
    made.arrangement = arrangement
    return made


@pytest.mark.parametrize("shuffle", [False, True])
def test_whole_epochs_have_every_row(shuffle: bool) -> None:
    work = workload_of(loader(known(LENGTHS), shuffle=shuffle), 3)
    assert (work.steps, work.tokens, work.exact) == (9, 3 * 20, True)


def test_the_largest_micro_batch_is_that_of_a_step() -> None:
    assert workload_of(loader(known(LENGTHS)), 1).largest == Largest(3 + 5, 6)
    padded = loader(known(LENGTHS), Arrangement.PADDED)
    assert workload_of(padded, 1).largest == Largest(2 * 5, 6)
    accumulated = loader(known(LENGTHS), batch_size=1, accumulation=5)
    assert workload_of(accumulated, 1) == Workload(1, 20, True, Largest(6, 6))


def test_an_epoch_that_is_cut_repeats_its_first_rows_unless_they_are_shuffled() -> None:
    work = workload_of(loader(known(LENGTHS), steps_per_epoch=1), 100)
    assert (work.steps, work.tokens, work.exact) == (100, 100 * (3 + 5), True)


def test_a_few_shuffled_epochs_that_are_cut_are_counted() -> None:
    orders = [
        epoch_order(LENGTHS, 2, shuffle=True, grouped=False, seed=[3, epoch, 0])[0] for epoch in range(3)
    ]
    work = workload_of(loader(known(LENGTHS), shuffle=True, steps_per_epoch=1), 3)
    assert (work.tokens, work.exact) == (sum(LENGTHS[i] for order in orders for i in order), True)


def test_many_shuffled_epochs_that_are_cut_are_judged_by_some() -> None:
    work = workload_of(loader(known([4] * 10), shuffle=True, steps_per_epoch=2), 100)
    assert (work.steps, work.tokens, work.exact) == (200, 200 * 2 * 4, False)


@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_that_are_not_tokenized_yet_count_as_the_others(shuffle: bool) -> None:
    work = workload_of(loader(known([4, 4], [9, 9, 9, 9], made=1), shuffle=shuffle), 2)
    assert (work.steps, work.tokens, work.exact) == (6, 2 * 6 * 4, False)


def test_rows_of_many_shards_that_are_there_are_all_counted() -> None:
    shards = known([1] * 8192, [2] * 8192, [3] * 100)
    work = workload_of(loader(shards, batch_size=8), 2)
    assert (work.tokens, work.exact) == (2 * (8192 + 2 * 8192 + 300), True)


def test_tokens_of_some_rows() -> None:
    shards = known(LENGTHS, [9, 9], made=1)
    assert tokens_of([(shards, 0, [0, 3])]) == 3 + 4
    assert tokens_of([(shards, 0, [0, 1]), (shards, 1, [0, 1])]) == 8 + 2 * 4
    assert tokens_of([]) == 0
