"""Norms against those that they replace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules.engine.norms import LayerNorm, rms_norm_class

WIDTH = 24


def norm(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    made: Any = kind(WIDTH)
    made.weight.data.normal_(1, 0.3)
    return made


def fast(module: nn.Module) -> Any:
    made = copy.deepcopy(module)
    made.__class__ = LayerNorm if type(module) is nn.LayerNorm else rms_norm_class(module)
    return made


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, nn.LayerNorm])
def test_values_and_gradients_are_those_of_the_original(kind: type[nn.Module]) -> None:
    original = norm(kind)
    replaced = fast(original)
    assert isinstance(replaced, kind)
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    results = []
    for module in (original, replaced):
        output = module(hidden)
        upstream = torch.linspace(-1, 2, output.numel()).view_as(output)
        results.append([output, *torch.autograd.grad(output, [hidden, *module.parameters()], upstream)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("smallest", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_a_frozen_norm_keeps_its_result_where_that_says_all(kind: type[nn.Module], smallest: float) -> None:
    original = norm(kind).requires_grad_(False)
    original.weight[3] = smallest - (1.0 if kind is GemmaRMSNorm else 0.0)
    replaced, hidden = fast(original), torch.randn(2, 5, WIDTH, requires_grad=True)
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = replaced(hidden)
    assert (output.data_ptr() in kept) is (smallest == 0.1)
    upstream = torch.linspace(-1, 2, output.numel()).view_as(output)
    (found,) = torch.autograd.grad(output, hidden, upstream)
    (wanted,) = torch.autograd.grad(original(hidden), hidden, upstream)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.LayerNorm])
def test_an_fp32_stream_meets_bf16_weights(kind: type[nn.Module]) -> None:
    replaced, hidden = fast(norm(kind).bfloat16()), torch.randn(3, WIDTH)
    assert replaced(hidden).dtype == torch.bfloat16
    assert replaced(hidden.bfloat16()).dtype == torch.bfloat16
    replaced.in_fp32 = True
    exact = norm(kind).bfloat16().float()(hidden)
    torch.testing.assert_close(replaced(hidden), exact)


def test_under_autocast_the_result_has_its_type() -> None:
    replaced, hidden = fast(norm(LlamaRMSNorm)), torch.randn(3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert replaced(hidden).dtype == torch.bfloat16
    assert replaced(hidden).dtype == torch.float32


def test_an_overflow_is_no_number() -> None:
    hidden = torch.full((1, WIDTH), 1e30)
    assert fast(norm(LlamaRMSNorm))(hidden).isnan().all()


class SquaredRMSNorm(LlamaRMSNorm):
    """Named like a norm, and another formula."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = super().forward(hidden_states).square()
        return answer


def test_other_formulas_are_left_alone() -> None:
    assert rms_norm_class(norm(SquaredRMSNorm)) is None
    assert rms_norm_class(nn.Linear(3, 3)) is None
