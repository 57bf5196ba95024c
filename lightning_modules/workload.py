"""How many tokens a job will train and validate on, and its largest micro-batch, before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from lightning_modules.data.batches import PADDING
from lightning_modules.data.loaders import Seen, StepLoader

EPOCHS, ROWS = 4, 2**13
"""Epochs whose order is looked at where they differ, and about how many rows of each: some milliseconds."""


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch of this process.

    :param tokens: in its tensors, padding included.
    :param width: tokens of its longest row.
    """

    tokens: int
    width: int


@dataclass(frozen=True)
class Workload:
    """What a job trains.

    :param steps: optimizer steps of all epochs.
    :param tokens: of all epochs' training rows, padding left out.
    :param exact: whether the tokens were counted; otherwise what was looked at stands for the rest.
    """

    steps: int
    tokens: int
    exact: bool
    largest: Largest


def workload_of(loader: StepLoader, n_epochs: int) -> Workload:
    """Count what so many epochs train on.

    Exact if all rows are tokenized, and every epoch has the same ones or its order is looked at.
    """
    whole, steps = len(loader) == loader.whole_epoch, len(loader) * n_epochs
    same = whole or not loader.shuffle
    epochs = 1 if same else min(n_epochs, EPOCHS)
    found = looked_at = 0
    largest = Largest(0, 0)
    for epoch in range(epochs):
        for rows in islice(loader.lengths_of(epoch), max(1, ROWS // loader.step_rows)):
            found, looked_at = found + sum(rows), looked_at + 1
            largest = _larger(largest, rows, loader)
    if looked_at == epochs * len(loader) and (same or epochs == n_epochs):
        return Workload(steps, found * (n_epochs if same else 1), True, largest)
    if whole and loader.shards.all_made:
        counts = range(len(loader.shards.counts))
        found = sum(sum(loader.shards[number].lengths) for number in counts)
        return Workload(steps, found * n_epochs, True, largest)
    return Workload(steps, round(found / looked_at * steps), False, largest)


def _larger(largest: Largest, rows: Sequence[int], loader: StepLoader) -> Largest:
    for micro in filter(None, loader.share.micros(rows, loader.batch_size)):
        width = max(micro)
        tokens = len(micro) * width if loader.arrangement in PADDING else sum(micro)
        largest = Largest(max(largest.tokens, tokens), max(largest.width, width))
    return largest


def tokens_of(parts: Sequence[Seen]) -> int:
    """Return the tokens of items of shards; those of shards that may not be made yet count as the others."""
    tokens = items = missing = 0
    for shards, number, indices in parts:
        if number > 0 and not shards.all_made:
            missing += len(indices)
            continue
        lengths = shards[number].lengths
        tokens += sum(lengths[index] for index in indices)
        items += len(indices)
    return tokens + (missing * tokens // items if items else 0)
