"""How probable a model finds given answers, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_modules.data.batches import Arrangement, collate
from lightning_modules.data.tokenize import Item
from lightning_modules.objective import scored_log_probs


@dataclass(frozen=True)
class Scores:
    """Of each sequence (n), those of an item behind each other: a pair's chosen one comes first.

    :param log_probs: sums over its scored tokens, in nats.
    :param tokens: how many those are.
    """

    log_probs: list[float]
    tokens: list[int]


@torch.no_grad()
def score(
    model: nn.Module,
    items: Iterable[Item],
    *,
    batch_size: int,
    pad_id: int,
    arrangement: Arrangement,
) -> Scores:
    """Score items in their order.

    :param model: in evaluation mode.
    :param batch_size: items that are scored together.
    :param arrangement: one that the model takes.
    """
    remaining, found = iter(items), Scores([], [])
    device = next(model.parameters()).device
    while rows := list(islice(remaining, batch_size)):
        batch = move_data_to_device(collate([[item] for item in rows], pad_id, arrangement), device)
        tokens = [sequence.scored for item in rows for sequence in item.sequences]
        log_probs = scored_log_probs(model, batch, in_fp32=True).double()
        found.log_probs.extend(float(part.sum()) for part in torch.split(log_probs, tokens))
        found.tokens.extend(tokens)
    return found
