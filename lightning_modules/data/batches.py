"""Items become the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch

from lightning_modules.data.layout import Ids, arrange
from lightning_modules.data.tokenize import Item, Pair
from lightning_modules.engine.tiles import Layout

Batch = dict[str, Any]
"""``input_ids`` (b, s); of the n scored tokens ``predictors`` (n), the places in the flattened (b · s) whose
hidden states predict them, and ``targets`` (n), their ids; ``tokens`` and ``scored``, the numbers of real and
of scored tokens; ``units``, what the loss is a mean over: scored tokens, or pairs; where rows are shared
``position_ids`` (b, s), and without padding ``layout``; of pairs ``sequence`` (n), the number of each scored
token's sequence, and ``reference`` (n) where it was computed, its reference log-probability. A batch of no
units is silent: it goes through the model, and nothing of it counts."""

Row = Sequence[Item]
"""What stands together in a batch: one item, or several where rows are packed."""


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


def silent(batch: Batch) -> Batch:
    """Return a batch that does not count: a process has it whose peers have one more than its own rows."""
    return batch | {"tokens": 0, "scored": 0, "units": 0}


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
