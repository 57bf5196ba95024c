"""What leaves the device between the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules import offloading


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what was copied."""
    shapes: list[tuple[int, ...]] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        shapes.extend(tuple(size) for size in shape if isinstance(size, torch.Size))
        return empty(*shape, **options)

    monkeypatch.setattr(offloading.torch, "empty", counted)
    return shapes


def test_activations_are_copied_weights_are_not_and_gradients_stay(copied: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)), torch.randn(4, 3)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(inputs).square().sum(), list(model.parameters())))

    expected = gradients()
    with offloading.offloaded(model):
        loss = model(inputs).square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, wanted in zip(found, expected, strict=True):
        assert torch.equal(gradient, wanted)
    assert {(4, 3), (4, 5), (4, 2)} <= set(copied)
    assert not {(5, 3), (3, 5), (2, 5), (5, 2)} & set(copied)


def test_what_two_functions_keep_is_copied_once_and_what_has_changed_again(
    copied: list[tuple[int, ...]],
) -> None:
    inputs = torch.linspace(-1, 1, 6).requires_grad_()
    with offloading.offloaded(nn.Identity()):
        hidden = inputs.exp()  # which keeps its result
        shared = hidden.detach()
        output = inputs * shared + hidden * inputs
    (gradient,) = torch.autograd.grad(output.sum(), inputs)
    e = inputs.detach().exp()
    torch.testing.assert_close(gradient, 2 * e + inputs.detach() * e)
    assert len(copied) == 2, "the inputs and their exponentials"
    copied.clear()
    with offloading.offloaded(nn.Identity()):
        first = inputs * shared
        second = inputs * shared.mul_(2)
    for product, factor in ((first, e), (second, 2 * e)):
        torch.testing.assert_close(torch.autograd.grad(product.sum(), inputs)[0], factor)
    assert len(copied) == 2, "what the inputs were multiplied by, at either time"
