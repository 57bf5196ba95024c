"""Examples become batches: order, padding, packing, and a position that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from lightning_modules.data.packing import pack
from lightning_modules.data.tokenize import IGNORED, Example, Pair

Batch = dict[str, Any]
"""``input_ids`` and ``labels`` (b, s); ``tokens`` and ``scored``, the numbers of real and of scored tokens;
``units``, what the loss is a mean over: scored tokens, or pairs; where rows are packed ``position_ids``
(b, s) and ``layout``, the lengths of each row's sequences; of pairs ``sequence`` (n), the number of each
scored token's sequence, and ``reference`` (n) where it was computed, its reference log-probability."""

SORT_WINDOW = 16
"""Optimizer steps among which rows of like length are brought together."""

Item = Example | Pair
Row = Sequence[Item]
"""What shares a row of a batch: one item, or several where rows are packed."""


def collate(rows: Sequence[Row], pad_id: int, *, packed: bool) -> Batch:
    """Put rows under each other, padded at the end to the longest.

    No mask is needed: no real token can attend to the padding that follows it. In a packed row
    positions restart with each sequence, which is how the model tells the sequences apart; the
    padding is a sequence of its own. A pair that is not packed takes two rows, the chosen one first.
    """
    items = [item for row in rows for item in row]
    lines = [[sequence for item in row for sequence in item.sequences] for row in rows]
    if not packed:
        lines = [[sequence] for line in lines for sequence in line]
    batch = _stack(lines, pad_id)
    batch["units"] = batch["scored"]
    if packed:
        width = batch["input_ids"].shape[1]
        layout = [[*map(len, line), width - sum(map(len, line))] for line in lines]
        batch["layout"] = [[length for length in line if length] for line in layout]
    else:
        del batch["position_ids"]
    return batch | _of_pairs([item for item in items if isinstance(item, Pair)])


def _stack(lines: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Write each line's sequences behind each other."""
    width = max(sum(map(len, line)) for line in lines)
    input_ids = torch.full((len(lines), width), pad_id)
    labels = torch.full((len(lines), width), IGNORED)
    position_ids = torch.zeros((len(lines), width), dtype=torch.long)
    for i, line in enumerate(lines):
        at = 0
        for example in line:
            end = at + len(example)
            input_ids[i, at:end] = torch.tensor(example.input_ids)
            labels[i, at:end] = torch.tensor(example.labels)
            position_ids[i, at:end] = torch.arange(len(example))
            at = end
        position_ids[i, at:] = torch.arange(width - at)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "tokens": sum(len(example) for line in lines for example in line),
        "scored": int((labels != IGNORED).sum()),
    }


def _of_pairs(pairs: Sequence[Pair]) -> Batch:
    """Return what a batch of pairs holds beside its tokens; nothing for other batches."""
    if not pairs:
        return {}
    scored = torch.tensor([example.scored for pair in pairs for example in pair.sequences])
    batch: Batch = {"units": len(pairs), "sequence": torch.arange(len(scored)).repeat_interleave(scored)}
    references = [pair.reference for pair in pairs if pair.reference is not None]
    return batch | {"reference": torch.cat(references)} if len(references) == len(pairs) else batch


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
        order = self._order(self.epoch)
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

    def items_seen(self, n_epochs: int) -> list[Item]:
        """Return what so many epochs train on, each item once, in the rows' order."""
        seen: set[int] = set()
        for epoch in range(n_epochs if self.shuffle else 1):
            seen.update(i for step in self._order(epoch)[: self.length] for i in step)
            if len(seen) == len(self.rows):
                break
        return [item for i in sorted(seen) for item in self.rows[i]]

    def _order(self, epoch: int) -> list[list[int]]:
        lengths = [sum(map(len, row)) for row in self.rows]
        return epoch_order(lengths, self.step_rows, shuffle=self.shuffle, seed=self.seed, epoch=epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and the optimizer steps of it that were handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state at the next iteration."""
        self.epoch, self.position = state["epoch"], state["position"]


class BatchLoader:
    """Yields batches in a fixed order; Lightning would take a plain list for several loaders."""

    def __init__(self, items: Sequence[Item], batch_size: int, pad_id: int) -> None:
        self.batches = [
            [[item] for item in items[at : at + batch_size]] for at in range(0, len(items), batch_size)
        ]
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
    :param max_seq_length: tokens of a packed row for each sequence that an item has: a pair has two.
    """

    def __init__(
        self,
        train: Sequence[Item],
        validation: Sequence[Item],
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
        rows: list[Row] = [[item] for item in train]
        if packed:
            capacity = max_seq_length * max(len(item.sequences) for item in train)
            rows = [[train[i] for i in row] for row in pack([len(item) for item in train], capacity)]
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
        read = None if validation_batches is None else validation_batches * batch_size
        self.validation_items = validation[:read]
        self._batch_size = batch_size
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
        return self.batches_of(self.validation_items)

    def batches_of(self, items: Sequence[Item]) -> BatchLoader:
        """Return batches of any items, as validation has them."""
        return BatchLoader(items, self._batch_size, self._pad_id)

    def items_seen(self, n_epochs: int) -> list[Item]:
        """Return what so many epochs train and validate on, each item once, in a fixed order."""
        items = [*self.train_loader.items_seen(n_epochs), *self.validation_items]
        return list({id(item): item for item in items}.values())
