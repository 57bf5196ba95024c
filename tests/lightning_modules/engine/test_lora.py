"""LoRA layers against peft's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_modules.engine.lora import Linear, use_fast_adapters


class Model(nn.Module):
    """Two layers, one of them GPT-2's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), Conv1D(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.second(self.first(x).tanh())
        return answer


def adapted(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]}
    config = LoraConfig(**(settings | {"init_lora_weights": False} | changes))
    return get_peft_model(Model(), config)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.Linear)]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_values_and_gradients_are_peft_s() -> None:
    theirs = adapted()
    ours = copy.deepcopy(theirs)
    use_fast_adapters(ours)
    assert {type(layer) for layer in layers(ours)} == {Linear}
    x, results = torch.randn(2, 7, 6, requires_grad=True), []
    for model in (theirs, ours):
        output = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 4
        upstream = torch.linspace(-1, 1, 56).view(2, 7, 4)
        results.append([output, *torch.autograd.grad(output, [x, *trained], upstream)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_adapters_switch_off_and_merge_as_peft_s() -> None:
    model = adapted()
    use_fast_adapters(model)
    x = torch.randn(3, 6)
    with_adapters = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(model, x))
    assert not torch.allclose(plain(model, x), with_adapters)
    torch.testing.assert_close(model.merge_and_unload()(x), with_adapters)


def plain(model: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = (layer.base_layer for layer in layers(model))
    answer: torch.Tensor = second(first(x).tanh())
    return answer


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_a_bf16_base_is_updated_in_bf16_and_its_adapters_stay_fp32() -> None:
    model = adapted()
    exact = model(torch.ones(2, 6))
    for layer in layers(model):
        layer.base_layer.bfloat16()
    use_fast_adapters(model)
    output = model(torch.ones(2, 6, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.03, atol=0.03)
    output.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_is_more_than_lora_stays_peft_s(changes: dict[str, Any]) -> None:
    model = adapted(**changes)
    use_fast_adapters(model)
    assert Linear not in {type(layer) for layer in layers(model)}
