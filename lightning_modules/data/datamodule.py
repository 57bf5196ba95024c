"""Examples become batches: order, arrangement, packing, and a position that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_modules.data.layout import Ids, arrange
from lightning_modules.data.packing import pack
from lightning_modules.data.shards import Shards
from lightning_modules.data.tokenize import Item, Pair
from lightning_modules.engine.tiles import Layout

Batch = dict[str, Any]
"""``input_ids`` (b, s); of the n scored tokens ``predictors`` (n), the places in the flattened (b · s) whose
hidden states predict them, and ``targets`` (n), their ids; ``tokens`` and ``scored``, the numbers of real and
of scored tokens; ``units``, what the loss is a mean over: scored tokens, or pairs; where rows are shared
``position_ids`` (b, s), and without padding ``layout``; of pairs ``sequence`` (n), the number of each scored
token's sequence, and ``reference`` (n) where it was computed, its reference log-probability."""

SORT_WINDOW = 16
"""Optimizer steps among which rows of like length are brought together."""

Row = Sequence[Item]
"""What stands together in a batch: one item, or several where rows are packed."""

Seen = tuple[Shards, int, list[int]]
"""Items of a shard: the data set, the shard's number, and theirs in it."""


class Arrangement(Enum):
    """How a batch's sequences lie in its tensors; which of these a model takes is tried out."""

    PADDED = "a sequence in each row, padded to the longest"
    PACKED = "the sequences of a row behind each other, told apart by their positions, padded to the longest"
    FLAT = "all sequences in one row, told apart by the layout"
    TREE = "all sequences in one row, beginnings that several share standing once"


PADDING = (Arrangement.PADDED, Arrangement.PACKED)
"""Arrangements in which rows of like length waste less."""


def collate(rows: Sequence[Row], pad_id: int, arrangement: Arrangement) -> Batch:
    """Make a batch of rows.

    A sequence ends before its last scored token, for what follows predicts nothing. Padding stands at the end
    and needs no mask: no real token can attend to it. The chosen sequence of a pair comes first.
    """
    items = [item for row in rows for item in row]
    lines = [[sequence for item in row for sequence in item.sequences] for row in rows]
    if arrangement is Arrangement.PADDED:
        lines = [[sequence] for line in lines for sequence in line]
    sequences = [sequence for line in lines for sequence in line]
    scored = [sequence.scored_places for sequence in sequences]
    ids = [sequence.ids for sequence in sequences]
    used = [whole[: at[-1]] for whole, at in zip(ids, scored, strict=True)]
    if arrangement in PADDING:
        batch, places = _in_rows(used, [len(line) for line in lines], pad_id)
    else:
        batch, places = _in_one_row(used, share=arrangement is Arrangement.TREE)
    if arrangement is Arrangement.PADDED:
        del batch["position_ids"]
    counts = list(map(len, scored))
    predictors = [places[at - 1] for places, at in zip(places, scored, strict=True)]
    batch["predictors"] = torch.from_numpy(np.concatenate(predictors))
    targets = [whole[at] for whole, at in zip(ids, scored, strict=True)]
    batch["targets"] = torch.from_numpy(np.concatenate(targets))
    batch |= {"tokens": sum(map(len, sequences)), "scored": sum(counts), "units": sum(counts)}
    return batch | _of_pairs([item for item in items if isinstance(item, Pair)], counts)


def _in_one_row(sequences: Sequence[Ids], *, share: bool) -> tuple[Batch, list[Ids]]:
    """Lay sequences out without padding; return the places of each one's tokens too."""
    row = arrange(sequences, share)
    ids, positions = (torch.from_numpy(values)[None] for values in (row.input_ids, row.position_ids))
    batch = {"input_ids": ids, "position_ids": positions, "layout": Layout(row.segments)}
    return batch, row.places


def _in_rows(sequences: Sequence[Ids], counts: Sequence[int], pad_id: int) -> tuple[Batch, list[Ids]]:
    """Write the sequences of each row behind each other; return the places of each one's tokens too.

    Positions restart with each sequence; a row's padding is a sequence of its own.

    :param counts: sequences of each row.
    """
    remaining = iter(sequences)
    lines = [[next(remaining) for _ in range(count)] for count in counts]
    width = max(sum(map(len, line)) for line in lines)
    input_ids = np.full((len(lines), width), pad_id)
    position_ids = np.zeros_like(input_ids)
    places = []
    for i, line in enumerate(lines):
        at = 0
        for ids in line:
            end = at + len(ids)
            input_ids[i, at:end] = ids
            position_ids[i, at:end] = np.arange(len(ids))
            places.append(np.arange(i * width + at, i * width + end))
            at = end
        position_ids[i, at:] = np.arange(width - at)
    batch = {"input_ids": torch.from_numpy(input_ids), "position_ids": torch.from_numpy(position_ids)}
    return batch, places


def _of_pairs(pairs: Sequence[Pair], scored: Sequence[int]) -> Batch:
    """Return what a batch of pairs holds beside its tokens; nothing for other batches.

    :param scored: scored tokens of each sequence.
    """
    if not pairs:
        return {}
    owners = torch.arange(len(scored)).repeat_interleave(torch.tensor(scored))
    batch: Batch = {"units": len(pairs), "sequence": owners}
    references = [pair.reference for pair in pairs if pair.reference is not None]
    return batch | {"reference": torch.cat(references)} if len(references) == len(pairs) else batch


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
    """Yields, for each optimizer step, the list of its micro-batches.

    A step's tokens are then known before its first backward pass, and a checkpoint between steps is
    a checkpoint between batches. The state is the epoch and the position in it. A step has rows of one shard;
    shuffled, the rows of a shard change places, and the shards do: but the first epoch begins with the first.

    :param capacity: tokens of a packed row; None packs none.
    :param steps_per_epoch: optimizer steps after which an epoch ends; None is all of them.
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
    ) -> None:
        self.shards = shards
        self.batch_size = batch_size
        self.step_rows = batch_size * accumulation
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
                    collate(
                        [[shard[item] for item in rows[row]] for row in step[at : at + self.batch_size]],
                        self.pad_id,
                        self.arrangement,
                    )
                    for at in range(0, len(step), self.batch_size)
                ]

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
    """

    def __init__(self, parts: Sequence[Seen], batch_size: int, pad_id: int, arrangement: Arrangement) -> None:
        self._parts = parts
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._arrangement = arrangement

    def __len__(self) -> int:
        return -(-sum(len(indices) for _, _, indices in self._parts) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        items = (
            [shard[index]]
            for shards, number, indices in self._parts
            for shard in [shards[number]]
            for index in indices
        )
        while rows := list(islice(items, self._batch_size)):
            yield collate(rows, self._pad_id, self._arrangement)


class FineTuningData(pl.LightningDataModule):
    """Training and validation batches.

    :param train: training rows.
    :param validation: validation rows, read in file order, never packed.
    :param validation_batches: how many batches of them are read; None is all, 0 none.
    :param max_seq_length: tokens of a packed row for each sequence that an item has: a pair has two.
    """

    def __init__(
        self,
        train: Shards,
        validation: Shards,
        *,
        pad_id: int,
        batch_size: int,
        validation_batches: int | None,
        max_seq_length: int,
        packed: bool = False,
        accumulation: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__()
        self.train_loader = StepLoader(
            train,
            batch_size=batch_size,
            accumulation=accumulation,
            shuffle=shuffle,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            pad_id=pad_id,
            capacity=max_seq_length * len(train[0][0].sequences) if packed else None,
        )
        read = None if validation_batches is None else validation_batches * batch_size
        self._validation = [
            (validation, number, indices) for number, indices in _first(validation.counts, read).items()
        ]
        self._batch_size = batch_size
        self._pad_id = pad_id

    def arrange(self, arrangement: Arrangement) -> None:
        """Say how batches are laid out; until then they are padded."""
        self.train_loader.arrangement = arrangement

    def train_dataloader(self) -> StepLoader:
        """Return the loader of optimizer steps."""
        return self.train_loader

    def state_dict(self) -> dict[str, int]:
        """Return the training loader's position.

        Lightning itself gives a loader its state back only within an epoch, not at an epoch's end.
        """
        return self.train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Put the training loader back to a position."""
        self.train_loader.load_state_dict(state_dict)

    def make_ahead(self) -> None:
        """Tokenize the rows that are left while training goes on."""
        self.train_loader.shards.make_ahead()

    def close(self) -> None:
        """End what was begun ahead."""
        self.train_loader.shards.close()

    def val_dataloader(self) -> BatchLoader:
        """Return the validation batches in file order."""
        return self.batches_of(self._validation)

    def batches_of(self, parts: Sequence[Seen]) -> BatchLoader:
        """Return batches of any items, as validation has them."""
        alone = self.train_loader.arrangement
        if alone is Arrangement.PACKED:
            alone = Arrangement.PADDED
        return BatchLoader(parts, self._batch_size, self._pad_id, alone)

    def seen(self, n_epochs: int) -> list[Seen]:
        """Return what so many epochs train and validate on, in file order; what both have comes twice."""
        train = self.train_loader.shards
        trained = self.train_loader.seen(n_epochs).items()
        return [(train, number, indices) for number, indices in trained] + self._validation


def _first(counts: Sequence[int], limit: int | None) -> dict[int, list[int]]:
    """Return the first items of a data set by their shards."""
    found, left = {}, sum(counts) if limit is None else limit
    for number, count in enumerate(counts):
        if left > 0:
            found[number] = list(range(min(count, left)))
        left -= count
    return found
