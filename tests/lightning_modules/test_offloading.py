"""What leaves the device between the passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_modules import offloading


def test_activations_are_copied_weights_are_not_and_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)), torch.randn(4, 3)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(inputs).square().sum(), list(model.parameters())))

    expected = gradients()
    copied: list[tuple[int, ...]] = []
    empty = torch.empty

    def counted(shape: torch.Size, **options: object) -> Tensor:
        copied.append(tuple(shape))
        return empty(shape, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(offloading.torch, "empty", counted)
    with offloading.offloaded(model):
        loss = model(inputs).square().sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, wanted in zip(found, expected, strict=True):
        assert torch.equal(gradient, wanted)
    assert {(4, 3), (4, 5), (4, 2)} <= set(copied)
    assert not {(5, 3), (3, 5), (2, 5), (5, 2)} & set(copied)
