"""A job's training and validation batches."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_modules.data.batches import Arrangement
from lightning_modules.data.loaders import BatchLoader, Seen, StepLoader
from lightning_modules.data.shards import Shards
from lightning_modules.data.share import WHOLE, Share


class FineTuningData(pl.LightningDataModule):
    """Training and validation batches.

    :param train: training rows.
    :param validation: validation rows, read in file order, never packed.
    :param batch_size: rows of a micro-batch on one device.
    :param validation_batches: how many batches of them each device reads; None is all, 0 none.
    :param max_seq_length: tokens of a packed row for each sequence that an item has: a pair has two.
    :param share: what of all batches this process takes.
    :ivar data_sets: by what they are for.
    :ivar max_row_length: tokens of the longest row that there can be.
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
        share: Share = WHOLE,
    ) -> None:
        super().__init__()
        self.data_sets: dict[str, Shards] = {"training": train}
        if validation is not train:
            self.data_sets["validation"] = validation
        self.max_row_length = max_seq_length * len(train[0][0].sequences)
        self.train_loader = StepLoader(
            train,
            batch_size=batch_size,
            accumulation=accumulation,
            shuffle=shuffle,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            pad_id=pad_id,
            capacity=self.max_row_length if packed else None,
            share=share,
        )
        read = None if validation_batches is None else validation_batches * share.rows(batch_size)
        self._validation = [
            (validation, number, indices) for number, indices in _first(validation.counts, read).items()
        ]
        self._batch_size = batch_size
        self._share = share
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
        return BatchLoader(parts, self._batch_size, self._pad_id, alone, self._share)

    def taken_by(self, rank: int, indices: Sequence[int]) -> list[int]:
        """Return which items of a part the batches of a process hold, in their order."""
        micros = self._share.of_rank(rank).micros(indices, self._batch_size)
        return [index for micro in micros for index in micro]

    @property
    def validated(self) -> list[Seen]:
        """What each validation reads, in file order."""
        return self._validation

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
