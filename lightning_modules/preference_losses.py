"""Pure functions from token log-ratios of preference pairs to rewards and losses.

Padded and packed batches share them: the completion tokens of p pairs are one flat tensor (n), and a
second one says which of the 2p sequences each token belongs to, in the order chosen_0, rejected_0,
chosen_1, … A log-ratio is ρ = log π_θ − log π_ref of one token, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from post_training.schemas.algorithms import DPOAlignmentConfig, DPOLossType


@dataclass(frozen=True)
class Rewards:
    """Implicit rewards of a batch of p pairs.

    :param chosen: (p).
    :param rejected: (p).
    :param clipped: share of the 2p rewards that the clamp changed; a scalar without gradient.
    :param of_all: means of chosen and rejected rewards over all processes that share the batch; None is this
        one alone.
    """

    chosen: Tensor
    rejected: Tensor
    clipped: Tensor
    of_all: tuple[Tensor, Tensor] | None = None

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of each side's rewards, without gradient."""
        return self.of_all or (self.chosen.detach().mean(), self.rejected.detach().mean())

    @property
    def margins(self) -> Tensor:
        """h = r_chosen − r_rejected (p)."""
        return self.chosen - self.rejected


def discounted_sums(log_ratios: Tensor, sequence: Tensor, count: int, gamma: float) -> Tensor:
    """Sum γ^t ρ_t over each sequence, t counted from 0.

    Reference: Shao et al., "Earlier Tokens Contribute More: Learning Direct Preference Optimization
    From Temporal Decay Perspective", https://arxiv.org/abs/2502.14340 .

    :param log_ratios: ρ (n).
    :param sequence: number of each token's sequence, 0 to count − 1 (n); the tokens of a sequence
        stand in their order, those of others may lie between.
    :param count: number of sequences.
    :param gamma: discount; 1 is exactly the plain sum.
    :returns: (count); 0 for a sequence without tokens.
    """
    ordered, order = sequence.sort(stable=True)
    lengths = torch.bincount(ordered, minlength=count)
    firsts = lengths.cumsum(0) - lengths
    places = torch.arange(len(ordered), device=ordered.device) - firsts[ordered]
    weighted = gamma ** places.to(log_ratios.dtype) * log_ratios[order]
    return log_ratios.new_zeros(count).index_add(0, ordered, weighted)


def rewards(log_ratios: Tensor, sequence: Tensor, config: DPOAlignmentConfig) -> Rewards:
    """Compute r = clamp(reward_scale · β · s, ±reward_clip) for each sequence.

    s is the discounted sum of the log-ratios; for IPO it is divided by the number of tokens + ε.

    :param log_ratios: ρ (n).
    :param sequence: number of each token's sequence, 0 to 2p − 1 (n); each has a token.
    """
    count = int(sequence.max()) + 1
    sums = discounted_sums(log_ratios, sequence, count, config.gamma)
    if config.loss_type is DPOLossType.ipo:
        sums = sums / (torch.bincount(sequence) + config.epsilon)
    raw = config.reward_scale * config.beta * sums
    limit = math.inf if config.reward_clip is None else config.reward_clip
    chosen, rejected = raw.clamp(-limit, limit).view(-1, 2).unbind(1)
    return Rewards(chosen, rejected, clipped=(raw.detach().abs() > limit).to(raw.dtype).mean())


def sigmoid_loss(rewards: Rewards, config: DPOAlignmentConfig) -> Tensor:
    """−log(σ(h) + ε): Bradley-Terry's negative log-likelihood, at most −log ε.

    Reference: Rafailov et al., https://arxiv.org/abs/2305.18290, equation 7.
    """
    log_epsilon = rewards.chosen.new_tensor(config.epsilon).log()  # −inf for 0, which adds nothing
    return -torch.logaddexp(functional.logsigmoid(rewards.margins), log_epsilon)


def hinge_loss(rewards: Rewards, config: DPOAlignmentConfig) -> Tensor:
    """max(0, 1 − h).

    Reference: Zhao et al., "SLiC-HF", https://arxiv.org/abs/2305.10425, on DPO's rewards.
    """
    return functional.relu(1 - rewards.margins)


def ipo_loss(rewards: Rewards, config: DPOAlignmentConfig) -> Tensor:
    """(h/β − 1/(2β))², with rewards averaged per token.

    Reference: Azar et al., https://arxiv.org/abs/2310.12036, equation 17, whose τ is β.
    """
    return (rewards.margins / config.beta - 1 / (2 * config.beta)) ** 2


def kto_pair_loss(rewards: Rewards, config: DPOAlignmentConfig) -> Tensor:
    """Mean of 1 − σ(r_c − KL_r) and 1 − σ(KL_c − r_r).

    KL is the batch mean of a side's rewards, at least 0, and has no gradient; a batch that several processes
    share has one mean. 1 − σ(x) is computed
    as σ(−x), which keeps its gradient where σ(x) rounds to 1.

    Reference: Ethayarajh et al., "KTO", https://arxiv.org/abs/2402.01306 .
    """
    kl_chosen, kl_rejected = (mean.clamp(min=0) for mean in rewards.means)
    return ((kl_rejected - rewards.chosen).sigmoid() + (rewards.rejected - kl_chosen).sigmoid()) / 2


PREFERENCE_LOSSES: Mapping[DPOLossType, Callable[[Rewards, DPOAlignmentConfig], Tensor]] = {
    DPOLossType.sigmoid: sigmoid_loss,
    DPOLossType.hinge: hinge_loss,
    DPOLossType.ipo: ipo_loss,
    DPOLossType.kto_pair: kto_pair_loss,
}
"""Loss of each pair (p), by type."""


@torch.no_grad()
def kl_estimate(log_ratios: Tensor) -> Tensor:
    """Sum exp(−ρ) − 1 + ρ over tokens: an estimate of KL(π_θ ‖ π_ref), in nats.

    Never negative, and unbiased where the policy itself wrote the tokens; on given completions it
    tells how far the policy has moved.

    Reference: Schulman, http://joschu.net/blog/kl-approx.html, estimator k3.

    :param log_ratios: ρ (n).
    :returns: a scalar without gradient.
    """
    return (torch.expm1(-log_ratios) + log_ratios).sum()
