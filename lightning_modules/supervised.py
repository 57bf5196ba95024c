"""Supervised fine-tuning: the cross-entropy of given answers."""

from __future__ import annotations

from torch import nn

from lightning_modules.data.datamodule import Batch
from lightning_modules.losses import scored_hidden, token_loss_sum
from lightning_modules.objective import Outcome, Sum, language_model
from lightning_modules.probes import hidden_states


class SupervisedFineTuning:
    """The objective of full, LoRA and QAT fine-tuning; a unit is a scored token."""

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """Sum the cross-entropy of the batch's scored tokens, in nats."""
        transformer = language_model(model)
        hidden = hidden_states(
            transformer, batch["input_ids"], batch.get("position_ids"), batch.get("layout")
        )
        selected, targets = scored_hidden(hidden, batch["labels"])
        head = transformer.get_output_embeddings()  # type: ignore[no-untyped-call]
        loss = token_loss_sum(selected, targets, head, transformer.config.get_text_config())
        return Outcome(loss, nll=Sum(loss.detach(), batch["scored"]))
