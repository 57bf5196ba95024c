"""Names of modules in each architecture."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_modules.adapters import add_adapters
from post_training.errors import ModelError
from post_training.schemas.algorithms import LoraFinetuningConfig
from tests.lightning_modules.tiny import TINY


def tiny(kind: str, **changes: Any) -> Any:
    config = copy.deepcopy(TINY[kind])  # a model changes the config that it is given
    config.update(changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def lora(
    *attention: str, mlp: bool = False, output: bool = False, dora: bool = False
) -> LoraFinetuningConfig:
    return LoraFinetuningConfig(
        lora_attn_modules=list(attention),
        apply_lora_to_mlp=mlp,
        apply_lora_to_output=output,
        rank=2,
        alpha=4,
        use_dora=dora,
    )


def adapted(model: Any, config: LoraFinetuningConfig) -> set[str]:
    """Names of the first layer's adapted modules, and of the head."""
    names = {
        name for name, _ in add_adapters(model, config, "base").named_modules() if name.endswith(".lora_A")
    }
    paths = {name.removeprefix("base_model.model.").removesuffix(".lora_A") for name in names}
    return {path.split(".0.")[-1] for path in paths if ".1." not in path}


LLAMA_LIKE = ["llama", "qwen2", "mistral", "gemma", "gemma2"]
ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_llama_like(kind: str) -> None:
    assert adapted(tiny(kind), lora("q_proj", "v_proj")) == {"self_attn.q_proj", "self_attn.v_proj"}
    assert (
        adapted(tiny(kind), lora("output_proj"))
        == adapted(tiny(kind), lora("o_proj"))
        == {"self_attn.o_proj"}
    )
    everything = lora("q_proj", "k_proj", "v_proj", "output_proj", mlp=True, output=True)
    assert adapted(tiny(kind), everything) == ATTENTION | MLP | {"lm_head"}
    assert adapted(tiny(kind), lora(mlp=True)) == MLP


def test_gpt2(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert adapted(tiny("gpt2"), lora("q_proj", "v_proj")) == {"attn.c_attn"}
    assert "v_proj is part of the fused module attn.c_attn" in caplog.text
    assert adapted(tiny("gpt2"), lora("output_proj", mlp=True, output=True)) == {
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        "lm_head",
    }


def test_phi3() -> None:
    fused = {"self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    assert adapted(tiny("phi3"), lora("k_proj", mlp=True)) == fused


def test_an_architectures_own_name_is_accepted() -> None:
    assert adapted(tiny("llama"), lora("up_proj")) == {"mlp.up_proj"}


def test_a_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"qq_proj matches no module of this llama model; .* are down_proj, gate_"
    ):
        add_adapters(tiny("llama"), lora("q_proj", "qq_proj"), "base")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_output_head_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=r"apply_lora_to_output is refused: .* shares its weight"):
        add_adapters(tiny(kind, tie_word_embeddings=True), lora("q_proj", output=True), "base")


def test_only_adapters_train_and_in_fp32() -> None:
    model = add_adapters(tiny("llama").to(torch.bfloat16), lora("q_proj", dora=True), "base")
    trained = {
        name.split(".")[-2 if name.endswith("weight") else -1]: p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert any("lora_magnitude_vector" in name for name, _ in model.named_parameters())
    assert model.peft_config["default"].base_model_name_or_path == "base"
