"""The reference's log-probabilities of preference pairs, computed once and kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import lightning.pytorch as pl
import torch

from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.data.loaders import Seen
from lightning_modules.data.shards import Shards
from lightning_modules.module import PostTraining
from lightning_modules.ranks import Ranks

log = logging.getLogger(__name__)


def compute_references(
    trainer: pl.Trainer, module: PostTraining, data: FineTuningData, n_epochs: int
) -> None:
    """Compute the reference's log-probabilities of all pairs that will be seen and have none.

    They are computed before the first optimizer step, of a full fine-tuning by the model itself, and kept for
    later attempts and other jobs.

    :raises StopRequestedError: if the process is to stop.
    """
    ranks = module.ranks
    for shards, number, indices in data.seen(n_epochs):
        if not _without_reference(ranks, shards, number, indices):
            continue
        with shards.computing_references(number, module.should_stop) if ranks.first else nullcontext():
            module.stop_if_asked()
            missing = _without_reference(ranks, shards, number, indices)
            if missing:
                log.info("computing the reference's log-probabilities of %d pairs", len(missing))
                log_probs = references_of(trainer, module, data, (shards, number, missing))
                with ranks.leaders_first():
                    if ranks.leader:
                        shards.set_references(number, missing, log_probs)
                    else:
                        shards.forget(number)


def _without_reference(ranks: Ranks, shards: Shards, number: int, indices: Sequence[int]) -> list[int]:
    """Return which pairs have no reference's log-probabilities on one of the machines."""
    found = ranks.gathered(shards.without_reference(number, indices))
    return sorted({index for missing in found for index in missing})


def references_of(
    trainer: pl.Trainer, module: PostTraining, data: FineTuningData, part: Seen
) -> torch.Tensor:
    """Return the reference's log-probabilities of pairs' scored tokens, one pair after the other (n)."""
    shards, number, indices = part
    own = torch.cat(cast(list[torch.Tensor], trainer.predict(module, data.batches_of([part])))).cpu()
    found = module.ranks.gathered(own)
    if len(found) == 1:
        return own
    of_pair: dict[int, torch.Tensor] = {}
    for rank, log_probs in enumerate(found):
        taken = data.taken_by(rank, indices)
        counts = [sum(len(s.scored_places) for s in shards[number][pair].sequences) for pair in taken]
        of_pair |= dict(zip(taken, torch.split(log_probs, counts), strict=True))
    return torch.cat([of_pair[index] for index in indices])
