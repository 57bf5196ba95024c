"""How probable a model finds given answers, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_modules.data.batches import Arrangement, collate
from lightning_modules.data.tokenize import Item
from lightning_modules.objective import scored_log_probs


@dataclass(frozen=True)
class Scored:
    """Of each sequence of an item: log-probability of its scored tokens in nats, and how many those are."""

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def margin(self) -> float:
        """Log-probability of a pair's chosen answer less that of the rejected one."""
        chosen, rejected = self.log_probs
        return chosen - rejected


def score(
    model: nn.Module,
    items: Iterable[Item],
    *,
    batch_size: int,
    pad_id: int,
    arrangement: Arrangement,
) -> Iterator[Scored]:
    """Score items in their order.

    :param model: in evaluation mode.
    :param batch_size: items that are scored together.
    :param arrangement: one that the model takes.
    """
    remaining, device = iter(items), next(model.parameters()).device
    while rows := list(islice(remaining, batch_size)):
        batch = move_data_to_device(collate([[item] for item in rows], pad_id, arrangement), device)
        counts = [tuple(sequence.scored for sequence in item.sequences) for item in rows]
        with torch.no_grad():
            log_probs = scored_log_probs(model, batch, in_fp32=True).double()
        sums = (float(part.sum()) for part in torch.split(log_probs, list(chain(*counts))))
        for tokens in counts:
            yield Scored(tuple(islice(sums, len(tokens))), tokens)
