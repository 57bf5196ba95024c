"""Supervised fine-tuning: the cross-entropy of given answers."""

from __future__ import annotations

from torch import nn

from lightning_modules.data.batches import Batch
from lightning_modules.objective import Outcome, Sum, scored_log_probs


class SupervisedFineTuning:
    """The objective of full, LoRA and QAT fine-tuning; a unit is a scored token."""

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """Sum the cross-entropy of the batch's scored tokens, in nats."""
        loss = -scored_log_probs(model, batch, in_fp32=False).sum()
        return Outcome(loss, nll=Sum(loss.detach(), batch["scored"]))
