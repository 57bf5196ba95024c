"""Proofs of the algorithms' parameters: adapters, and the loss of preferences."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_modules.objective import scored_log_probs
from post_training.errors import ModelError
from post_training.schemas.algorithms import DPOAlignmentConfig
from tests.lightning_modules.fields import readers
from tests.lightning_modules.fields.bench import Bench, Proof, Trial, at, every, fails, refuses, shows

EVERY_WEIGHT = 2 * 309 * 32 + 2 * (3 * 64 + 2 * 32 + 2 * 16) * 32 + 5 * 32
"""Numbers in the tiny model: embedding and head, seven projections in each of two layers, five norms."""
UPDATES = 2 * 4 * (32 + 32 + 32 + 16)
"""Numbers in adapters of rank 4 on q_proj, 32 to 32, and v_proj, 32 to 16, of two layers."""
PROJECTIONS = {"q_proj": 2, "v_proj": 2}
"""What the bench's request adapts: a projection of each layer."""
MLP = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2)


def wide(bench: Bench) -> str:
    """A model in which each block of 64 weights is a part of a row."""
    return bench.model(hidden_size=64, intermediate_size=128)


def adapters(group: str, model: str, fake: int = 0, **changes: Any) -> dict[str, Proof]:
    """The proofs of each field of a group of adapters, by the field's path.

    :param model: name of the field that holds the model.
    :param fake: how many layers compute with fake-quantized weights.
    :param changes: other fields of the requests.
    """
    names = (["q_proj"], {"q_proj": 2}), (["k_proj", "output_proj"], {"k_proj": 2, "o_proj": 2})
    ranks = [(rank, {(rank, 32), (32, rank), (16, rank)}) for rank in (2, 4)]
    factors = [(alpha, pytest.approx(alpha / 4, rel=1e-3)) for alpha in (8, 2)]
    union = group if group == "algorithm_config" else None  # whose types are told apart before its fields
    on_wide = {model: wide, **changes}
    found = {
        "type": every(
            shows(readers.parameters, ("LoRA", (UPDATES, fake)), **changes),
            at(group, shows(readers.parameters, (None, (EVERY_WEIGHT, fake)), **changes)),
            refuses("'LoRA'", "ORPO", field=union, **changes),
        ),
        "lora_attn_modules": every(
            shows(readers.adapters, *names, **changes),
            fails(ModelError, "z_proj matches no module", ["q_proj", "z_proj"], **changes),
        ),
        "apply_lora_to_mlp": shows(
            readers.adapters, (False, PROJECTIONS), (True, PROJECTIONS | MLP), **changes
        ),
        "apply_lora_to_output": shows(
            readers.adapters, (False, PROJECTIONS), (True, PROJECTIONS | {"lm_head": 1}), **changes
        ),
        "rank": shows(readers.shapes, *ranks, **changes),
        "alpha": shows(readers.scaling, *factors, **changes),
        "use_dora": shows(readers.magnitudes, (False, []), (None, []), (True, [32, 16]), **changes),
        "quantize_base": shows(readers.levels, (False, 64), (None, 64), (True, 16), **on_wide),
    }
    return {f"{group}.{name}": proof for name, proof in found.items()}


def prefers(*values: Any, **changes: Any) -> Proof:
    """At known log-ratios each value gives the rewards and the loss of the formulas, and all differ."""

    def proof(bench: Bench) -> None:
        losses = []
        for value in values:
            module, batch = (trial := bench.trial(value, **changes)).job.module, first_batch(trial)
            config = trial.spec.request.algorithm_config
            owners = batch["sequence"].tolist()
            # Growing along the chosen answers, falling along the rejected ones, and other for each pair.
            ratios = [(0.02 + 0.01 * i) * (-1) ** owner for i, owner in enumerate(owners)]
            batch["reference"] = scored_log_probs(module.model, batch, in_fp32=True).detach() - torch.tensor(
                ratios
            )
            outcome = module.objective(module.model, batch)
            by_hand = [
                reward([r for r, o in zip(ratios, owners, strict=True) if o == n], config) for n in range(4)
            ]
            assert outcome.metrics["rewards/chosen"].total.item() == pytest.approx(
                sum(by_hand[0::2]), rel=1e-3
            )
            assert outcome.metrics["rewards/rejected"].total.item() == pytest.approx(
                sum(by_hand[1::2]), rel=1e-3
            )
            assert outcome.loss.item() == pytest.approx(loss(by_hand[0::2], by_hand[1::2], config), rel=1e-3)
            losses.append(outcome.loss.item())
        assert all(abs(a - b) > 0.01 * abs(a) for a, b in pairwise(losses))

    return proof


def first_batch(trial: Trial) -> Any:
    return next(iter(trial.job.data.train_loader))[0]


def reward(ratios: list[float], config: DPOAlignmentConfig) -> float:
    """A sequence's reward, as CONTRACT.md writes it."""
    total = sum(config.gamma**t * ratio for t, ratio in enumerate(ratios))
    if config.loss_type.value == "ipo":
        total /= len(ratios) + config.epsilon
    limit = math.inf if config.reward_clip is None else config.reward_clip
    return max(-limit, min(limit, config.reward_scale * config.beta * total))


def loss(chosen: list[float], rejected: list[float], config: DPOAlignmentConfig) -> float:
    """The sum of a batch's losses, likewise."""
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    kl_chosen, kl_rejected = (max(0.0, sum(side) / len(side)) for side in (chosen, rejected))
    kto = [1 - sigmoid(c - kl_rejected) for c in chosen] + [1 - sigmoid(kl_chosen - r) for r in rejected]
    return {
        "sigmoid": sum(-math.log(sigmoid(h) + config.epsilon) for h in margins),
        "hinge": sum(max(0.0, 1 - h) for h in margins),
        "ipo": sum((h / config.beta - 1 / (2 * config.beta)) ** 2 for h in margins),
        "kto_pair": sum(kto) / 2,  # the mean over both sides, a pair being the unit
    }[config.loss_type.value]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
