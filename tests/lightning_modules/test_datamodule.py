"""Steps, shards and the position that is resumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch

from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.data.loaders import epoch_order
from lightning_modules.data.share import Share
from lightning_modules.data.tokenize import Example, Item, Pair


def example(length: int, first: int = 1) -> Example:
    ids = list(range(first, first + length))
    return Example(ids, [-100, *ids[1:]])


class Items(list[Item]):
    """A shard in memory."""

    @property
    def lengths(self) -> list[int]:
        return list(map(len, self))


@dataclass
class InMemory:
    """A data set whose shards are lists; what else a job asks of one is left out."""

    shards: Sequence[Items]

    @classmethod
    def of(cls, items: Sequence[Item], size: int = 1000) -> Any:
        return cls([Items(items[at : at + size]) for at in range(0, len(items), size)])

    @property
    def counts(self) -> list[int]:
        return list(map(len, self.shards))

    def __getitem__(self, number: int) -> Items:
        return self.shards[number]

    def check(self) -> None:
        """Nothing can be wrong."""


def pair(chosen: int, rejected: int, reference: list[float] | None = None) -> Pair:
    numbers = torch.tensor(reference) if reference is not None else None
    return Pair(example(chosen), example(rejected, first=10), numbers)


def test_packed_pairs_fit_a_row_of_two_sequences() -> None:
    pairs = [pair(4, 4), pair(2, 2), pair(2, 2), pair(3, 3)]
    options: dict[str, Any] = {"pad_id": 0, "batch_size": 1, "validation_batches": 0, "max_seq_length": 4}
    data = FineTuningData(InMemory.of(pairs), InMemory.of(pairs), **options, packed=True)
    assert [step[0]["units"] for step in data.train_loader] == [1, 2, 1]


def test_items_seen_are_those_of_the_epochs_and_of_the_validation() -> None:
    train, held_out = (InMemory.of([pair(2, 2) for _ in range(count)]) for count in (8, 3))
    options: dict[str, Any] = {"pad_id": 0, "batch_size": 2, "max_seq_length": 8, "steps_per_epoch": 1}
    data = FineTuningData(train, held_out, validation_batches=1, **options)
    assert data.seen(5) == [(train, 0, [0, 1]), (held_out, 0, [0, 1])]
    shuffled = FineTuningData(train, train, validation_batches=0, shuffle=True, **options)
    seen = [
        i
        for epoch in range(2)
        for i in epoch_order([4] * 8, 2, shuffle=True, grouped=True, seed=[0, epoch, 0])[0]
    ]
    assert shuffled.seen(2) == [(train, 0, sorted(set(seen)))]
    assert shuffled.seen(10**6) == [(train, 0, list(range(8)))]


def module(size: int = 1000, **changes: Any) -> FineTuningData:
    train = InMemory.of([example(2 + i % 5, first=10 * i) for i in range(11)], size)
    options: dict[str, Any] = {"pad_id": 0, "batch_size": 2, "validation_batches": 2, "max_seq_length": 8}
    options |= {"accumulation": 2, "shuffle": True, "seed": 3}
    return FineTuningData(train, train, **(options | changes))


def ids(step: list[dict[str, Any]]) -> list[Any]:
    return [batch["input_ids"].tolist() for batch in step]


def test_a_step_is_the_list_of_its_micro_batches() -> None:
    loader = module(shuffle=False).train_dataloader()
    steps = list(loader)
    assert len(loader) == len(steps) == 3
    assert [[len(batch["input_ids"]) for batch in step] for step in steps] == [[2, 2], [2, 2], [2, 1]]


def test_accumulation_and_a_larger_batch_see_the_same_rows() -> None:
    small, large = module().train_dataloader(), module(batch_size=4, accumulation=1).train_dataloader()
    for parts, (whole,) in zip(small, large, strict=True):
        assert sum(batch["tokens"] for batch in parts) == whole["tokens"]


def test_an_epoch_may_be_cut_and_the_next_has_its_own_order() -> None:
    whole, cut = module().train_dataloader(), module(steps_per_epoch=2).train_dataloader()
    for _ in range(2):
        assert [ids(step) for step in cut] == [ids(step) for step in whole][:2]
    assert (len(cut), cut.whole_epoch) == (2, 3)
    assert len(module(steps_per_epoch=99).train_dataloader()) == 3


def rows_of(loader: Iterable[list[dict[str, Any]]]) -> list[int]:
    """The numbers of the rows that were trained, by their last scored token."""
    return [int(target) // 10 for step in loader for batch in step for target in batch["targets"][-1:]]


def test_shards_follow_each_other_and_shuffled_change_places() -> None:
    one = {"batch_size": 1, "accumulation": 1}
    assert rows_of(module(4, **one, shuffle=False).train_dataloader()) == list(range(11))
    loader = module(4, **one).train_dataloader()
    epochs = [rows_of(loader) for _ in range(8)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert sorted(epochs[0][:4]) == [0, 1, 2, 3], "the first epoch begins with what is there"
    assert len({epoch[0] // 4 for epoch in epochs[1:]}) > 1, "later ones with any"
    assert len({tuple(row for row in epoch if row < 4) for epoch in epochs}) > 1


def test_a_step_has_rows_of_one_shard() -> None:
    loader = module(4, shuffle=False).train_dataloader()
    assert [sum(len(batch["input_ids"]) for batch in step) for step in loader] == [4, 4, 3]
    assert len(module(3, shuffle=False).train_dataloader()) == 4


@pytest.mark.parametrize("size", [1000, 4])
@pytest.mark.parametrize("position", range(7))
def test_a_loader_goes_on_where_another_stopped(position: int, size: int) -> None:
    first, second = module(size).train_dataloader(), module(size).train_dataloader()
    steps = chain.from_iterable(iter(first) for _ in range(3))
    for _ in range(position):
        next(steps)
    second.load_state_dict(first.state_dict())
    rest = [ids(step) for _ in range(3 - second.epoch) for step in second]
    assert rest == [ids(step) for step in steps]


def test_packed_rows_hold_every_sequence_once() -> None:
    loader = module(packed=True, accumulation=1, shuffle=False).train_dataloader()
    assert sum(batch["tokens"] for (batch,) in loader) == sum(2 + i % 5 for i in range(11))
    assert max(batch["input_ids"].shape[1] for (batch,) in loader) <= 8


def test_validation_is_in_file_order_and_limited() -> None:
    batches = list(module(packed=True).val_dataloader())
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 2]
    assert batches[0]["input_ids"].tolist() == [[0, 0], [10, 11]]
    assert len(list(module(3, validation_batches=4).val_dataloader())) == 4
    assert len(module(validation_batches=None).val_dataloader()) == 6
    assert len(module(validation_batches=0).val_dataloader()) == 0


def learned(batches: Iterable[dict[str, Any]]) -> list[int]:
    """The tokens that count, in their order."""
    return sorted(chain.from_iterable(batch["targets"].tolist() for batch in batches if batch["units"]))


@pytest.mark.parametrize("changes", [{}, {"packed": True}, {"size": 3}, {"accumulation": 1, "size": 5}])
def test_processes_share_the_steps_of_one_with_all_of_their_rows(changes: dict[str, Any]) -> None:
    whole = module(**changes, batch_size=4)
    parts = [module(**changes, batch_size=2, share=Share(2, rank, 2)) for rank in range(2)]
    for _ in range(2):
        loaders = (data.train_dataloader() for data in parts)
        for step, *shared in zip(whole.train_dataloader(), *loaders, strict=True):
            assert learned(chain(*shared)) == learned(step)
            assert sum(batch["units"] for part in shared for batch in part) == sum(b["units"] for b in step)
            assert len(shared[0]) == len(shared[1])


def test_processes_share_the_validation_of_one_with_all_of_their_rows() -> None:
    whole = module(batch_size=4, validation_batches=None)
    parts = [module(share=Share(2, rank, 2), validation_batches=None).val_dataloader() for rank in range(2)]
    shared = [list(part) for part in parts]
    assert [len(part) for part in shared] == list(map(len, parts)) == [3, 3]
    assert learned(chain(*shared)) == learned(whole.val_dataloader())
    limited = module(share=Share(2, 0, 2), validation_batches=2)
    assert limited.validated[0][2] == list(range(8))
    assert [limited.taken_by(rank, range(5)) for rank in range(2)] == [[0, 2, 4], [1, 3]]
