"""In which order batches come, and from where one goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from lightning_modules.data.batches import PADDING, Arrangement, Batch, collate, silent
from lightning_modules.data.packing import pack
from lightning_modules.data.shards import Shard, Shards
from lightning_modules.data.share import WHOLE, Share

SORT_WINDOW = 16
"""Optimizer steps among which rows of like length are brought together."""

Seen = tuple[Shards, int, list[int]]
"""Items of a shard: the data set, the shard's number, and theirs in it."""


def epoch_order(
    lengths: Sequence[int], step_rows: int, *, shuffle: bool, grouped: bool, seed: Sequence[int]
) -> list[list[int]]:
    """Divide the rows of a shard in one epoch among its optimizer steps; depends on the seed only.

    :param lengths: tokens of each row.
    :param step_rows: rows of one optimizer step: batch size times accumulation.
    :param grouped: where the order is shuffled, let rows of like length meet: a random order is sorted within
        windows of ``SORT_WINDOW`` steps, and the steps are shuffled.
    :param seed: of the job, the epoch and the shard.
    :returns: row indices of each step; one step may be short.
    """
    order = np.arange(len(lengths))
    random = np.random.default_rng(seed)
    if shuffle:
        order = random.permutation(order)
    if shuffle and grouped:
        window = step_rows * SORT_WINDOW
        parts = [order[at : at + window] for at in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(np.take(lengths, part), kind="stable")] for part in parts])
    steps = [order[at : at + step_rows].tolist() for at in range(0, len(order), step_rows)]
    return [steps[i] for i in random.permutation(len(steps))] if shuffle else steps


class StepLoader:
    """Yields, for each optimizer step, the list of its micro-batches on this device.

    A step's tokens are then known before its first backward pass, and a checkpoint between steps is
    a checkpoint between batches. The state is the epoch and the position in it. A step has rows of one shard;
    shuffled, the rows of a shard change places, and the shards do: but the first epoch begins with the first.

    :param capacity: tokens of a packed row; None packs none.
    :param steps_per_epoch: optimizer steps after which an epoch ends; None is all of them.
    :param share: what of each step this process trains; the steps are the same for all.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        accumulation: int,
        shuffle: bool,
        seed: int,
        steps_per_epoch: int | None,
        pad_id: int,
        capacity: int | None = None,
        share: Share = WHOLE,
    ) -> None:
        self.shards = shards
        self.batch_size = batch_size
        self.share = share
        self.step_rows = share.rows(batch_size) * accumulation
        self.shuffle = shuffle
        self.seed = seed
        self.pad_id = pad_id
        self.arrangement = Arrangement.PADDED
        self._bins = None
        if capacity is not None:
            self._bins = [pack(shards[number].lengths, capacity) for number in range(len(shards.counts))]
        rows = shards.counts if self._bins is None else list(map(len, self._bins))
        self._steps = [-(-count // self.step_rows) for count in rows]
        self.whole_epoch = sum(self._steps)
        self.length = min(steps_per_epoch or self.whole_epoch, self.whole_epoch)
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[Batch]]:
        # The position moves before the yield: whoever saves now has this step behind it.
        for number, first, last in self._parts(self.epoch, self.position):
            shard, rows = self.shards[number], self._rows(number)
            for step in self._order(number, self.epoch)[first:last]:
                self.shards.check()
                self.position += 1
                if self.position == self.length:
                    self.epoch, self.position = self.epoch + 1, 0
                yield [
                    self._batch(shard, [rows[row] for row in micro], rows[step[0]])
                    for micro in self.share.micros(step, self.batch_size)
                ]

    def _batch(self, shard: Shard, rows: Sequence[Sequence[int]], any_row: Sequence[int]) -> Batch:
        """Make a batch of rows; of none one that does not count, of any row."""
        batch = collate(
            [[shard[item] for item in row] for row in rows or [any_row]], self.pad_id, self.arrangement
        )
        return batch if rows else silent(batch)

    def seen(self, n_epochs: int) -> dict[int, list[int]]:
        """Return what so many epochs train on: the items of each shard, in file order."""
        found: dict[int, set[int]] = {}
        for epoch in range(n_epochs if self.shuffle else 1):
            for number, first, last in self._parts(epoch, 0):
                rows = self._rows(number)
                steps = self._order(number, epoch)[first:last]
                found.setdefault(number, set()).update(
                    item for step in steps for row in step for item in rows[row]
                )
            if sum(map(len, found.values())) == sum(self.shards.counts):
                break
        return {number: sorted(found[number]) for number in sorted(found)}

    def lengths_of(self, epoch: int) -> Iterator[list[int]]:
        """Yield the tokens of each row of an epoch's steps, up to a shard that may not be made yet."""
        for number, first, last in self._parts(epoch, 0):
            if number > 0 and not self.shards.all_made:
                return
            lengths = self.shards[number].lengths
            if self._bins is not None:
                lengths = [sum(lengths[item] for item in row) for row in self._bins[number]]
            for step in self._order(number, epoch)[first:last]:
                yield [lengths[row] for row in step]

    def _parts(self, epoch: int, position: int) -> Iterator[tuple[int, int, int]]:
        """Yield the shards of an epoch, of each the steps from a position on: first, and before which."""
        order = np.arange(len(self._steps))
        if self.shuffle:
            random = np.random.default_rng([self.seed, epoch])
            order = random.permutation(order)
            if epoch == 0:  # the first is there already
                order = np.concatenate([[0], order[order != 0]])
        at = 0
        for number in order.tolist():
            steps = self._steps[number]
            first, last = max(0, position - at), min(steps, self.length - at)
            if first < last:
                yield number, first, last
            at += steps

    def _rows(self, number: int) -> Sequence[Sequence[int]]:
        """Return the items that stand in each row of a shard."""
        return (
            [[item] for item in range(self.shards.counts[number])]
            if self._bins is None
            else self._bins[number]
        )

    def _order(self, number: int, epoch: int) -> list[list[int]]:
        rows = self._rows(number)
        grouped = self.shuffle and self.arrangement in PADDING
        lengths = [0] * len(rows)
        if grouped:
            of_items = self.shards[number].lengths
            lengths = [sum(of_items[item] for item in row) for row in rows]
        return epoch_order(
            lengths, self.step_rows, shuffle=self.shuffle, grouped=grouped, seed=[self.seed, epoch, number]
        )

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and the optimizer steps of it that were handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state at the next iteration."""
        self.epoch, self.position = state["epoch"], state["position"]


class BatchLoader:
    """Yields batches in a fixed order; Lightning would take a plain list for several loaders.

    :param parts: items of shards, in their order.
    :param share: what of them this process takes.
    """

    def __init__(
        self,
        parts: Sequence[Seen],
        batch_size: int,
        pad_id: int,
        arrangement: Arrangement,
        share: Share = WHOLE,
    ) -> None:
        self._parts = parts
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._arrangement = arrangement
        self._share = share

    def __len__(self) -> int:
        items = range(sum(len(indices) for _, _, indices in self._parts))
        return len(self._share.micros(items, self._batch_size))

    def __iter__(self) -> Iterator[Batch]:
        places = ((shards, number, index) for shards, number, indices in self._parts for index in indices)
        while whole := list(islice(places, self._share.rows(self._batch_size))):
            for micro in self._share.micros(whole, self._batch_size):
                items = [[shards[number][index]] for shards, number, index in micro or whole[:1]]
                batch = collate(items, self._pad_id, self._arrangement)
                yield batch if micro else silent(batch)
