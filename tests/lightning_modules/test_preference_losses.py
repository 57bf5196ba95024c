"""Rewards and preference losses by hand, and against TRL's."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.preference_losses import (
    PREFERENCE_LOSSES,
    Rewards,
    discounted_sums,
    hinge_loss,
    ipo_loss,
    kl_estimate,
    kto_pair_loss,
    rewards,
    sigmoid_loss,
)
from post_training.schemas.algorithms import DPOAlignmentConfig, DPOLossType

RATIOS = [0.5, -1.0, 2.0, 0.25, -0.5, 3.0, -4.0]
SEQUENCE = [0, 0, 0, 1, 2, 2, 3]
"""Two pairs: completions of 3 and 1, then of 2 and 1 tokens."""


def config(**fields: Any) -> DPOAlignmentConfig:
    return DPOAlignmentConfig(**fields)


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def of_pairs(chosen: Tensor, rejected: Tensor) -> Rewards:
    return Rewards(chosen, rejected, clipped=torch.zeros(()))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_discount_counts_from_the_start_of_each_sequence() -> None:
    ratios = leaf(1.0, 2.0, 4.0, 8.0, 16.0)
    sums = discounted_sums(ratios, torch.tensor([0, 0, 0, 1, 1]), 2, 0.5)
    assert sums.tolist() == [1 + 2 / 2 + 4 / 4, 8 + 16 / 2]
    (gradient,) = torch.autograd.grad(sums.sum(), [ratios])
    assert gradient.tolist() == [1, 1 / 2, 1 / 4, 1, 1 / 2]


def test_sequences_may_lie_between_each_other_and_may_be_empty() -> None:
    ratios = leaf(1.0, 2.0, 4.0, 8.0, 16.0)
    sums = discounted_sums(ratios, torch.tensor([2, 0, 2, 0, 2]), 4, 0.9)
    exactly = partial(pytest.approx, rel=1e-14, abs=0)
    assert sums.tolist() == exactly([2 + 0.9 * 8, 0, 1 + 0.9 * 4 + 0.81 * 16, 0])
    (gradient,) = torch.autograd.grad(sums.sum(), [ratios])
    assert gradient.tolist() == exactly([1, 1, 0.9, 0.9, 0.81])


def test_no_discount_is_exactly_the_plain_sum() -> None:
    torch.manual_seed(0)
    ratios, sequence = torch.randn(1000), torch.arange(4).repeat_interleave(250)
    plain = torch.zeros(4).index_add(0, sequence, ratios)
    assert torch.equal(discounted_sums(ratios, sequence, 4, 1.0), plain)


def test_a_long_sequence_s_discount_vanishes_without_harm() -> None:
    ratios = torch.ones(5000, requires_grad=True)
    sums = discounted_sums(ratios, torch.zeros(5000, dtype=torch.long), 1, 0.5)
    assert sums.item() == pytest.approx(1 / (1 - 0.5))
    (gradient,) = torch.autograd.grad(sums, [ratios])
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "chosen", "rejected", "clipped"),
    [
        ({"beta": 1.0}, [1.5, 2.5], [0.25, -4.0], 0.0),
        ({"beta": 0.5}, [0.75, 1.25], [0.125, -2.0], 0.0),
        ({"beta": 1.0, "reward_scale": 3.0}, [4.5, 7.5], [0.75, -12.0], 0.0),
        ({"beta": 1.0, "gamma": 0.5}, [0.5 - 1 / 2 + 2 / 4, -0.5 + 3 / 2], [0.25, -4.0], 0.0),
        ({"beta": 1.0, "reward_clip": 2.0}, [1.5, 2.0], [0.25, -2.0], 2 / 4),
        ({"beta": 0.5, "reward_scale": 2.0, "reward_clip": 4.0}, [1.5, 2.5], [0.25, -4.0], 0.0),
        ({"beta": 1.0, "epsilon": 9.0}, [1.5, 2.5], [0.25, -4.0], 0.0),
        ({"beta": 1.0, "loss_type": "ipo", "epsilon": 0.0}, [1.5 / 3, 2.5 / 2], [0.25, -4.0], 0.0),
        ({"beta": 1.0, "loss_type": "ipo", "epsilon": 1.0}, [1.5 / 4, 2.5 / 3], [0.125, -2.0], 0.0),
        (
            {"beta": 1.0, "loss_type": "ipo", "epsilon": 0.0, "reward_clip": 1.0},
            [0.5, 1.0],
            [0.25, -1.0],
            0.5,
        ),
    ],
)
def test_rewards_by_hand(
    fields: dict[str, Any], chosen: list[float], rejected: list[float], clipped: float
) -> None:
    found = rewards(leaf(*RATIOS), torch.tensor(SEQUENCE), config(**fields))
    assert found.chosen.tolist() == pytest.approx(chosen)
    assert found.rejected.tolist() == pytest.approx(rejected)
    assert found.clipped.item() == clipped


def test_the_clip_ends_the_gradient_outside_and_leaves_it_inside() -> None:
    ratios = leaf(*RATIOS)
    found = rewards(ratios, torch.tensor(SEQUENCE), config(beta=0.5, reward_clip=1.0))
    assert found.chosen.tolist() == [0.75, 1.0]
    assert not found.clipped.requires_grad
    (gradient,) = torch.autograd.grad(found.chosen.sum() + found.rejected.sum(), [ratios])
    assert gradient.tolist() == [0.5, 0.5, 0.5, 0.5, 0, 0, 0]


def test_every_loss_type_has_a_loss() -> None:
    assert set(PREFERENCE_LOSSES) == set(DPOLossType)


def test_sigmoid_by_hand() -> None:
    found = sigmoid_loss(of_pairs(leaf(1.0, -0.5), leaf(-1.0, 0.5)), config(epsilon=0.25))
    assert found.tolist() == pytest.approx([-math.log(sigma(2) + 0.25), -math.log(sigma(-1) + 0.25)])


def test_sigmoid_without_epsilon_is_exact_with_a_finite_gradient() -> None:
    margin = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0], requires_grad=True)
    found = sigmoid_loss(of_pairs(margin, torch.zeros(5)), config(epsilon=0.0))
    assert torch.equal(found, -torch.nn.functional.logsigmoid(margin))
    (gradient,) = torch.autograd.grad(found.sum(), [margin])
    assert gradient.tolist() == pytest.approx([-1, -sigma(20), -1 / 2, -sigma(-20), 0])


def test_epsilon_bounds_the_sigmoid_loss_and_its_gradient() -> None:
    margin = leaf(-50.0)
    found = sigmoid_loss(of_pairs(margin, leaf(0.0)), config(epsilon=1e-8))
    assert found.item() == pytest.approx(-math.log(1e-8))
    (gradient,) = torch.autograd.grad(found.sum(), [margin])
    assert -1e-12 < gradient.item() < 0


def test_hinge_by_hand() -> None:
    chosen, rejected = leaf(0.5, 2.0), leaf(0.25, 0.5)
    found = hinge_loss(of_pairs(chosen, rejected), config())
    assert found.tolist() == [1 - 0.25, 0.0]
    of_chosen, of_rejected = torch.autograd.grad(found.sum(), [chosen, rejected])
    assert of_chosen.tolist() == [-1, 0]
    assert of_rejected.tolist() == [1, 0]


def test_ipo_by_hand() -> None:
    chosen, rejected = leaf(0.5, -1.0), leaf(0.25, 1.0)
    found = ipo_loss(of_pairs(chosen, rejected), config(beta=0.5))
    assert found.tolist() == pytest.approx([(0.25 / 0.5 - 1) ** 2, (-2 / 0.5 - 1) ** 2])
    of_chosen, of_rejected = torch.autograd.grad(found.sum(), [chosen, rejected])
    assert of_chosen.tolist() == pytest.approx([2 * (0.5 - 1) / 0.5, 2 * (-4 - 1) / 0.5])
    assert torch.equal(of_rejected, -of_chosen)


@pytest.mark.parametrize(
    ("chosen", "rejected", "kl_chosen", "kl_rejected"),
    [
        ((1.0, 3.0), (-2.0, 0.5), 2.0, 0.0),  # the rejected side's mean is −0.75
        ((-1.0, 0.5), (2.0, 1.0), 0.0, 1.5),
    ],
)
def test_kto_pair_by_hand(
    chosen: tuple[float, ...], rejected: tuple[float, ...], kl_chosen: float, kl_rejected: float
) -> None:
    of = of_pairs(leaf(*chosen), leaf(*rejected))
    found = kto_pair_loss(of, config())
    good = [sigma(reward - kl_rejected) for reward in chosen]
    bad = [sigma(kl_chosen - reward) for reward in rejected]
    assert found.tolist() == pytest.approx([((1 - g) + (1 - b)) / 2 for g, b in zip(good, bad, strict=True)])
    # σ' = σ(1 − σ) and nothing through KL, which depends on every reward of its side
    of_chosen, of_rejected = torch.autograd.grad(found.sum(), [of.chosen, of.rejected])
    assert of_chosen.tolist() == pytest.approx([-g * (1 - g) / 2 for g in good])
    assert of_rejected.tolist() == pytest.approx([b * (1 - b) / 2 for b in bad])


def test_kto_pair_keeps_its_gradient_where_sigma_rounds_to_one() -> None:
    chosen = torch.tensor([40.0], requires_grad=True)
    found = kto_pair_loss(of_pairs(chosen, torch.tensor([-1.0])), config())
    (gradient,) = torch.autograd.grad(found.sum(), [chosen])
    assert gradient.item() == pytest.approx(-math.exp(-40) / 2, rel=1e-5, abs=0)


@pytest.mark.parametrize("loss_type", DPOLossType)
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_every_loss_favours_the_chosen_tokens(loss_type: DPOLossType, gamma: float) -> None:
    ratios, settings = leaf(*([0.0] * len(RATIOS))), config(loss_type=loss_type, gamma=gamma)
    sequence = torch.tensor(SEQUENCE)
    found = PREFERENCE_LOSSES[loss_type](rewards(ratios, sequence, settings), settings)
    assert found.shape == (2,)
    (gradient,) = torch.autograd.grad(found.sum(), [ratios])
    assert ((gradient < 0) == (sequence % 2 == 0)).all()
    assert ((gradient > 0) == (sequence % 2 == 1)).all()


def test_kl_estimate_by_hand() -> None:
    ratios = leaf(math.log(2), -math.log(2), 0.0)
    found = kl_estimate(ratios)
    assert found.item() == pytest.approx((1 / 2 - 1 + math.log(2)) + (2 - 1 - math.log(2)))
    assert not found.requires_grad


def test_kl_estimate_is_the_divergence_where_the_policy_wrote_the_tokens() -> None:
    policy, reference = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2]
    divergence = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    written = torch.arange(3).repeat_interleave(torch.tensor([70, 20, 10]))  # 100 tokens in proportion
    ratios = (torch.tensor(policy) / torch.tensor(reference)).log()[written]
    assert kl_estimate(ratios).item() == pytest.approx(100 * divergence, rel=1e-5)


TrlLoss = Callable[[Tensor, Tensor, Tensor, DPOAlignmentConfig], Tensor]


@pytest.fixture(scope="module")
def trl_loss() -> TrlLoss:
    """Run TRL's loss on one pair's log-ratios, over a model that returns given log-probabilities."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".torch.jit.script_method. is deprecated")
        from trl.trainer.dpo_trainer import DPOTrainer

    def loss(policy: Tensor, reference: Tensor, sequence: Tensor, settings: DPOAlignmentConfig) -> Tensor:
        completion = sequence == torch.arange(2)[:, None]  # each row of the batch scores its own tokens
        log_probs = torch.where(completion, policy, 0.0)
        nothing = torch.zeros(log_probs.shape)
        answer = SimpleNamespace(
            log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

        def model(**inputs: Any) -> Any:
            return answer

        model.training = False  # type: ignore[attr-defined]
        chosen, rejected = torch.where(completion, reference, 0.0).sum(1)
        inputs = {
            "input_ids": torch.zeros(2, len(sequence) + 1, dtype=torch.long),
            "completion_mask": torch.cat([torch.zeros(2, 1, dtype=torch.bool), completion], 1).long(),
            "ref_chosen_logps": chosen[None],
            "ref_rejected_logps": rejected[None],
        }
        answered: Tensor = DPOTrainer._compute_loss(minimal_trainer(model, settings), model, inputs, False)
        return answered

    return loss


def minimal_trainer(model: Any, settings: DPOAlignmentConfig) -> Any:
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        loss_types=[settings.loss_type.value],
        loss_weights=[1.0],
        beta=settings.beta,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_type", [DPOLossType.sigmoid, DPOLossType.hinge, DPOLossType.ipo])
def test_losses_and_gradients_equal_trl_s(loss_type: DPOLossType, beta: float, trl_loss: TrlLoss) -> None:
    torch.manual_seed(0)
    settings = config(loss_type=loss_type, beta=beta, epsilon=0.0)  # TRL knows no ε
    sequence = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 5])
    policy = (-3 * torch.rand(len(sequence), dtype=torch.float64)).requires_grad_()
    reference = -3 * torch.rand(len(sequence), dtype=torch.float64)
    ours = PREFERENCE_LOSSES[loss_type](rewards(policy - reference, sequence, settings), settings)
    theirs = torch.stack(
        [
            trl_loss(policy[of], reference[of], sequence[of] % 2, settings)
            for of in (sequence // 2 == pair for pair in range(3))
        ]
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    of_ours, of_theirs = (torch.autograd.grad(loss.sum(), [policy])[0] for loss in (ours, theirs))
    assert of_theirs.abs().sum() > 0
    torch.testing.assert_close(of_ours, of_theirs, rtol=0, atol=1e-6)
