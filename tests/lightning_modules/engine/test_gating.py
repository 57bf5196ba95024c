"""Gated layers against those that they replace."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from lightning_modules.engine.gating import gated_class

CONFIG: dict[str, Any] = {"hidden_size": 6, "intermediate_size": 10, "mlp_bias": True}


def layer(kind: Any, act: str) -> Any:
    torch.manual_seed(0)
    return kind(SimpleNamespace(**CONFIG, hidden_act=act, hidden_activation=act))


@pytest.mark.parametrize(
    ("kind", "act"), [(LlamaMLP, "silu"), (LlamaMLP, "gelu"), (GemmaMLP, "gelu_pytorch_tanh")]
)
def test_values_and_gradients_are_those_of_the_original(kind: Any, act: str) -> None:
    original = layer(kind, act)
    replaced = copy.deepcopy(original)
    replaced.__class__ = gated_class(original)
    assert isinstance(replaced, kind)
    hidden, saved = torch.randn(7, 6, requires_grad=True), []
    results = []
    for module in (original, replaced):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
            output = module(hidden)
        leaves = [hidden, *module.parameters()]
        results.append([output, *torch.autograd.grad(output, leaves, torch.linspace(-1, 1, 42).view(7, 6))])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    # the gate, what goes up, and their product, which the last projection keeps for its weight
    assert saved.count(torch.Size([7, 10])) == 3


@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_other_activations_are_left_alone(act: str) -> None:
    assert gated_class(layer(LlamaMLP, act)) is None
