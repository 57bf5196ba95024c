"""Learning rates by hand; which parameters decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_modules.optimization import DECAYS, OPTIMIZERS, Schedule, default_optimizer, make_optimizer
from post_training.schemas.training import OptimizerConfig, OptimizerType, RuntimeConfig


def rates(warmup: int, total: int, decay: str) -> list[float]:
    return [Schedule(8.0, warmup, total, decay).rate(step) for step in range(1, total + 1)]


def test_every_choice_of_the_schema_is_there() -> None:
    assert set(OPTIMIZERS) == set(OptimizerType)
    assert set(DECAYS) == set(RuntimeConfig.model_fields["scheduler"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("warmup", "total", "decay", "expected"),
    [
        (4, 8, "constant", [2, 4, 6, 8, 8, 8, 8, 8]),
        (4, 7, "linear", [2, 4, 6, 8, 6, 4, 2]),
        (0, 4, "linear", [8, 6, 4, 2]),
        (1, 4, "linear", [8, 6, 4, 2]),
        (2, 4, "cosine", [4, 8, 6, 2]),  # (1 + cos 60°)/2 = 3/4, (1 + cos 120°)/2 = 1/4
        (8, 2, "cosine", [1, 2]),
        (0, 1, "cosine", [8]),
    ],
)
def test_rates(warmup: int, total: int, decay: str, expected: list[float]) -> None:
    assert rates(warmup, total, decay) == pytest.approx(expected)


def test_no_step_has_a_rate_of_zero() -> None:
    assert all(rate > 0 for decay in DECAYS for warmup in range(5) for rate in rates(warmup, 4, decay))


def test_the_default_warms_up_for_a_tenth() -> None:
    assert [default_optimizer(1e-4, total).num_warmup_steps for total in (1, 10, 11, 200)] == [1, 1, 2, 20]


def config(kind: str) -> OptimizerConfig:
    return OptimizerConfig(optimizer_type=OptimizerType(kind), lr=0.5, weight_decay=0.2, num_warmup_steps=0)


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_only_matrices_decay(kind: str) -> None:
    layer = nn.Linear(2, 2)
    layer.bias.data.fill_(1.0)
    layer.weight.data.fill_(1.0)
    optimizer = make_optimizer(layer.parameters(), config(kind))
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert layer.bias.tolist() == [1.0, 1.0]
    # AdamW: 1 - lr·decay. SGD: the same. Adam's gradient is the decay alone, so its step is lr.
    expected = 0.5 if kind == "adam" else 0.9
    torch.testing.assert_close(layer.weight.data, torch.full((2, 2), expected))
