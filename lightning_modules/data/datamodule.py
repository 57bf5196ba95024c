"""Examples become batches: order, padding, packing, and a position that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_modules.data.packing import pack
from lightning_modules.data.tokenize import IGNORED, Example

Batch = dict[str, Any]
"""``input_ids`` and ``labels`` (b, s); ``tokens`` and ``scored``, the numbers of real and of scored tokens;
where rows are packed ``position_ids`` (b, s) and ``layout``, the lengths of each row's sequences."""

SORT_WINDOW = 16
"""Optimizer steps among which rows of like length are brought together."""

Row = list[Example]
"""The sequences of one row of a batch: one, or several where rows are packed."""


def collate(rows: Sequence[Row], pad_id: int, *, packed: bool) -> Batch:
    """Put rows under each other, padded at the end to the longest.

    No mask is needed: no real token can attend to the padding that follows it. In a packed row
    positions restart with each sequence, which is how the model tells the sequences apart; the
    padding is a sequence of its own.
    """
    width = max(sum(map(len, row)) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED)
    position_ids = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        at = 0
        for example in row:
            end = at + len(example)
            input_ids[i, at:end] = torch.tensor(example.input_ids)
            labels[i, at:end] = torch.tensor(example.labels)
            position_ids[i, at:end] = torch.arange(len(example))
            at = end
        position_ids[i, at:] = torch.arange(width - at)
    tokens = sum(len(example) for row in rows for example in row)
    batch: Batch = {"input_ids": input_ids, "labels": labels, "tokens": tokens}
    batch["scored"] = int((labels != IGNORED).sum())
    if packed:
        layout = [[*map(len, row), width - sum(map(len, row))] for row in rows]
        batch |= {"position_ids": position_ids, "layout": [[n for n in row if n] for row in layout]}
    return batch


def epoch_order(
    lengths: Sequence[int], step_rows: int, *, shuffle: bool, seed: int, epoch: int
) -> list[list[int]]:
    """Divide the rows of one epoch among its optimizer steps.

    Shuffled, rows of like length meet: a random order is sorted within windows of ``SORT_WINDOW``
    steps, and the steps are shuffled. The order depends on the seed and the epoch only.

    :param lengths: tokens of each row.
    :param step_rows: rows of one optimizer step: batch size times accumulation.
    :returns: row indices of each step; one step may be short.
    """
    order = np.arange(len(lengths))
    random = np.random.default_rng([seed, epoch])
    if shuffle:
        order = random.permutation(order)
        window = step_rows * SORT_WINDOW
        parts = [order[at : at + window] for at in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(np.take(lengths, part), kind="stable")] for part in parts])
    steps = [order[at : at + step_rows].tolist() for at in range(0, len(order), step_rows)]
    return [steps[i] for i in random.permutation(len(steps))] if shuffle else steps


class StepLoader:
    """Yields, for each optimizer step, the list of its micro-batches.

    A step's tokens are then known before its first backward pass, and a checkpoint between steps is
    a checkpoint between batches. The state is the epoch and the position in it.

    :param steps_per_epoch: optimizer steps after which an epoch ends; None is all of them.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        accumulation: int,
        shuffle: bool,
        seed: int,
        steps_per_epoch: int | None,
        pad_id: int,
        packed: bool,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.step_rows = batch_size * accumulation
        self.shuffle = shuffle
        self.seed = seed
        self.pad_id = pad_id
        self.packed = packed
        self.whole_epoch = -(-len(rows) // self.step_rows)
        self.length = min(steps_per_epoch or self.whole_epoch, self.whole_epoch)
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[Batch]]:
        lengths = [sum(map(len, row)) for row in self.rows]
        order = epoch_order(lengths, self.step_rows, shuffle=self.shuffle, seed=self.seed, epoch=self.epoch)
        # The position moves before the yield: whoever saves now has this step behind it.
        for step in order[self.position : self.length]:
            self.position += 1
            if self.position == self.length:
                self.epoch, self.position = self.epoch + 1, 0
            yield [
                collate(
                    [self.rows[i] for i in step[at : at + self.batch_size]], self.pad_id, packed=self.packed
                )
                for at in range(0, len(step), self.batch_size)
            ]

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and the optimizer steps of it that were handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state at the next iteration."""
        self.epoch, self.position = state["epoch"], state["position"]


class BatchLoader:
    """Yields batches in a fixed order; Lightning would take a plain list for several loaders."""

    def __init__(self, batches: Sequence[Sequence[Row]], pad_id: int) -> None:
        self.batches = batches
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (collate(rows, self.pad_id, packed=False) for rows in self.batches)


class FineTuningData(pl.LightningDataModule):
    """Training and validation batches.

    :param train: tokenized training rows.
    :param validation: tokenized validation rows, in file order, never packed.
    :param validation_batches: how many batches of them are read; None is all, 0 none.
    """

    def __init__(
        self,
        train: Sequence[Example],
        validation: Sequence[Example],
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
        rows: list[Row] = [[example] for example in train]
        if packed:
            rows = [[train[i] for i in row] for row in pack([len(e) for e in train], max_seq_length)]
        self.train_loader = StepLoader(
            rows,
            batch_size=batch_size,
            accumulation=accumulation,
            shuffle=shuffle,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            pad_id=pad_id,
            packed=packed,
        )
        batches = [
            [[example] for example in validation[at : at + batch_size]]
            for at in range(0, len(validation), batch_size)
        ]
        self._validation = batches[:validation_batches]
        self._pad_id = pad_id

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

    def val_dataloader(self) -> BatchLoader:
        """Return the validation batches in file order."""
        return BatchLoader(self._validation, self._pad_id)
