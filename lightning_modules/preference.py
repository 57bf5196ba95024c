"""Direct preference optimization: chosen answers against rejected ones, relative to a reference model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from lightning_modules.data.batches import Batch
from lightning_modules.objective import Outcome, Sum, scored_log_probs
from lightning_modules.preference_losses import PREFERENCE_LOSSES, Rewards, kl_estimate, rewards
from lightning_modules.ranks import ALONE, Ranks
from post_training.schemas import record as names
from post_training.schemas.algorithms import DPOAlignmentConfig, DPOLossType
from post_training.schemas.requests import PreferenceOptimizeRequest

LOSSES_WITH_EPSILON = (DPOLossType.sigmoid, DPOLossType.ipo)


class PreferenceOptimization:
    """The objective of DPO; a unit is a pair.

    The reference is the base model: its log-probabilities come with the batch where they were computed
    before training, else from the same model with its adapters switched off.

    Reference: Rafailov et al., https://arxiv.org/abs/2305.18290, equation 7.

    :param config: loss type and its parameters.
    :param ranks: the processes that share each batch.
    """

    def __init__(self, config: DPOAlignmentConfig, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.ranks = ranks

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        """Sum the batch's losses; the metrics are TRL's, means over pairs but for ``kl``, over tokens."""
        policy = scored_log_probs(model, batch, in_fp32=True)
        reference = batch["reference"] if "reference" in batch else reference_log_probs(model, batch)
        ratios = policy - reference
        result = rewards(ratios, batch["sequence"], self.config)
        if self.config.loss_type is DPOLossType.kto_pair and self.ranks.world > 1:
            result = replace(result, of_all=self._means(result, batch["units"]))
        losses = PREFERENCE_LOSSES[self.config.loss_type](result, self.config)
        chosen, rejected, pairs = result.chosen.detach(), result.rejected.detach(), batch["units"]
        margins, of_chosen = chosen - rejected, batch["sequence"] % 2 == 0
        return Outcome(
            losses.sum(),
            nll=Sum(-policy.detach()[of_chosen].sum(), int(of_chosen.sum())),
            metrics={
                names.METRIC_REWARD_CHOSEN: Sum(chosen.sum(), pairs),
                names.METRIC_REWARD_REJECTED: Sum(rejected.sum(), pairs),
                names.METRIC_REWARD_ACCURACY: Sum((chosen > rejected).float().sum(), pairs),
                names.METRIC_REWARD_MARGIN: Sum(margins.sum(), pairs),
                names.METRIC_REWARD_CLIPPED: Sum(result.clipped * pairs, pairs),
                names.METRIC_KL: Sum(kl_estimate(ratios), len(ratios)),
            },
            values={names.METRIC_REWARD_MARGIN: margins},
        )

    def _means(self, result: Rewards, pairs: int) -> tuple[Tensor, Tensor]:
        """Return the mean rewards of the batch's pairs in all processes, of which this one has so many."""
        chosen, rejected = (
            float(side.detach().sum()) if pairs else 0.0 for side in (result.chosen, result.rejected)
        )
        chosen, rejected, count = self.ranks.sums([chosen, rejected, pairs])
        return result.chosen.new_tensor(chosen / count), result.chosen.new_tensor(rejected / count)


def notices(request: PreferenceOptimizeRequest) -> Iterator[str]:
    """Say what a request sets and its loss does not have, or has in another way than expected."""
    config, training = request.algorithm_config, request.training_config
    default = DPOAlignmentConfig.model_fields["epsilon"].default
    if config.epsilon != default and config.loss_type not in LOSSES_WITH_EPSILON:
        having = " and ".join(loss.value for loss in LOSSES_WITH_EPSILON)
        yield f"algorithm_config.epsilon is in the losses {having}, not in {config.loss_type.value}"
    if config.loss_type is DPOLossType.kto_pair and training.gradient_accumulation_steps > 1:
        yield (
            "kto_pair compares with the mean reward of a micro-batch: with gradient_accumulation_steps it is"
            " a mean over batch_size pairs, not over the step's"
        )


@torch.no_grad()
def reference_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Return the scored tokens' log-probabilities (n) without adapters; of one that has none, as it is."""
    without: AbstractContextManager[None] = (
        model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    )
    with without:
        return scored_log_probs(model, batch, in_fp32=True)
