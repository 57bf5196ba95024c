"""What every training objective gives the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.data.batches import Batch
from lightning_modules.logprobs import token_log_probs
from lightning_modules.probes import hidden_states

RUN, SCORE = "run_and_score", "run_head"
"""Names of the methods that model and head have where their weights are divided among devices."""


@dataclass(frozen=True)
class Sum:
    """A sum of values, and how many they are."""

    total: Tensor
    count: int


@dataclass(frozen=True)
class Outcome:
    """An objective on one batch.

    :param loss: sum over the batch's units (scored tokens, or pairs); a scalar in fp32 with a gradient.
    :param nll: negative log-probabilities of answer tokens, in nats; perplexity is exp of their mean.
    :param metrics: further means by the metric's name.
    :param values: of these, each unit's own (b), where their distribution is of interest.
    """

    loss: Tensor
    nll: Sum
    metrics: Mapping[str, Sum] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def silent(self) -> Outcome:
        """Return that of a batch that does not count: its gradient is zero, for every trained weight."""
        nothing = Sum(self.loss.detach() * 0, 0)
        return Outcome(self.loss * 0, nothing, dict.fromkeys(self.metrics, nothing))


class Objective(Protocol):
    """Computes the loss of a batch, the number of whose units is ``batch["units"]``."""

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """Run the model on the batch."""


def language_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model, adapters inside."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def scored_log_probs(model: nn.Module, batch: Batch, *, in_fp32: bool) -> Tensor:
    """Return the log-probability of each scored token (n) in fp32, in nats.

    :param in_fp32: as of :func:`lightning_modules.logprobs.token_log_probs`.
    """
    transformer = language_model(model)
    # A model whose weights are divided gathers them around its methods: see lightning_modules.sharding.
    run = getattr(transformer, RUN, partial(run_and_score, transformer))
    return cast(Tensor, run(batch, in_fp32=in_fp32))


def run_and_score(transformer: PreTrainedModel, batch: Batch, *, in_fp32: bool) -> Tensor:
    """Run the decoder, and the head on the states that predict a scored token."""
    hidden = hidden_states(transformer, batch["input_ids"], batch.get("position_ids"), batch.get("layout"))
    selected = hidden.flatten(0, 1).index_select(0, batch["predictors"])
    head = transformer.get_output_embeddings()  # type: ignore[no-untyped-call]
    score = getattr(head, SCORE, partial(run_head, head))
    return cast(Tensor, score(selected, batch["targets"], transformer.config.get_text_config(), in_fp32))


def run_head(head: nn.Module, hidden: Tensor, targets: Tensor, config: Any, in_fp32: bool) -> Tensor:
    """Return the log-probabilities (n) of targets (n), given hidden states (n, h)."""
    return token_log_probs(hidden, targets, head, config, in_fp32=in_fp32)
