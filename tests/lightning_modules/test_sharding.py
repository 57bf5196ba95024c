"""Divided models, on a mesh of one process: what is gathered when, and the same gradients as whole ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from lightning_modules.adapters import add_adapters
from lightning_modules.data.batches import Arrangement, collate
from lightning_modules.data.tokenize import Example
from lightning_modules.objective import language_model
from lightning_modules.sharding import Shell, shard, whole
from lightning_modules.supervised import SupervisedFineTuning
from post_training.schemas.algorithms import LoraFinetuningConfig
from tests.lightning_modules.tiny import LORA, tiny_llama

HEAD_TOO = LORA | {"apply_lora_to_output": True}
FULL, ADAPTERS, ADAPTED_HEAD, TIED = None, LORA, HEAD_TOO, "tied"


def made(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama(tie_word_embeddings=kind == TIED))
    return (
        add_adapters(model, LoraFinetuningConfig.model_validate(kind), "x")
        if isinstance(kind, dict)
        else model
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of one micro-batch; weights that are not trained have none."""
    rows = [[Example([5, 6, 7, 8, n], [-100, -100, 7, 8, n])] for n in range(10, 13)]
    SupervisedFineTuning()(model, collate(rows, 0, Arrangement.PADDED)).loss.backward()
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    "kind", [FULL, ADAPTERS, ADAPTED_HEAD, TIED], ids=["full", "adapters", "head", "tied"]
)
def test_a_divided_model_has_the_same_gradients(
    kind: Any, apart: bool, offload: bool, mesh: DeviceMesh
) -> None:
    plain, divided = made(kind), made(kind)
    shard(divided, mesh, apart=apart, offload=offload)
    expected, found = gradients(plain), gradients(divided)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert all(isinstance(weight, DTensor) for weight in divided.parameters())


@pytest.mark.parametrize("apart", [False, True])
def test_embedding_and_head_may_be_gathered_apart(apart: bool, mesh: DeviceMesh) -> None:
    model = language_model(made(FULL))
    shard(model, mesh, apart=apart, offload=False)
    seen = []

    def look(*args: Any) -> None:
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        seen.append([isinstance(end.weight, DTensor) for end in ends])

    model.get_decoder().layers[1].register_forward_pre_hook(look)
    gradients(model)
    assert seen == [[apart, apart]]


@pytest.mark.parametrize("kind", [FULL, ADAPTERS, TIED], ids=["full", "adapters", "tied"])
def test_a_shell_is_filled_for_a_while(kind: Any, mesh: DeviceMesh) -> None:
    model = made(kind)
    before = copy.deepcopy(model.state_dict())
    shell = Shell.of(model, first=True, wanted=lambda weight: weight.requires_grad)
    shard(model, mesh, apart=True, offload=False)
    for _ in range(2):
        with shell.filled(model) as filled:
            for name, weight in filled.named_parameters():
                if weight.requires_grad:
                    assert torch.equal(weight, before[name])
            ends = (
                language_model(filled).get_input_embeddings(),
                language_model(filled).get_output_embeddings(),
            )
            assert (ends[0].weight is ends[1].weight) is (kind == TIED)
        assert {weight.device.type for weight in filled.parameters()} == {"meta"}


def test_other_processes_keep_nothing(mesh: DeviceMesh) -> None:
    model = made(FULL)
    shell = Shell.of(model, first=False, wanted=lambda weight: True)
    shard(model, mesh, apart=False, offload=False)
    with shell.filled(model) as filled:
        assert {weight.device.type for weight in filled.parameters()} == {"meta"}
