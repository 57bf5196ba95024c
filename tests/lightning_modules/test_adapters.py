"""Names of modules in each architecture, and what an adapter computes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    PretrainedConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from lightning_modules.adapters import add_adapters, target_modules
from post_training.errors import ModelError
from post_training.schemas.algorithms import LoraFinetuningConfig
from tests.lightning_modules.tiny import TINY, UNTIED

GEMMA3 = Gemma3TextConfig(**UNTIED, query_pre_attn_scalar=8, sliding_window=8)
VISION = SiglipVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
CONFIGS: dict[str, PretrainedConfig] = TINY | {
    "qwen3": Qwen3Config(**UNTIED),
    "gemma3_text": GEMMA3,
    "gemma3": Gemma3Config(text_config=GEMMA3, vision_config=VISION, mm_tokens_per_image=4),
}


def tiny(kind: str, **changes: Any) -> Any:
    """A model whose weights are always the same; keywords change its configuration."""
    config = copy.deepcopy(CONFIGS[kind])  # a model changes the config that it is given
    config.update(changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def lora(
    *attention: str, mlp: bool = False, output: bool = False, dora: bool = False, rank: int = 2
) -> LoraFinetuningConfig:
    """A configuration with alpha 4."""
    return LoraFinetuningConfig(
        lora_attn_modules=list(attention),
        apply_lora_to_mlp=mlp,
        apply_lora_to_output=output,
        rank=rank,
        alpha=4,
        use_dora=dora,
    )


def randomize(model: Any) -> Any:
    """Move every trained weight, for an untrained adapter changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(model: Any, config: LoraFinetuningConfig) -> set[str]:
    """Names of the first layer's adapted modules, and of the head."""
    names = {
        name for name, _ in add_adapters(model, config, "base").named_modules() if name.endswith(".lora_A")
    }
    paths = {name.removeprefix("base_model.model.").removesuffix(".lora_A") for name in names}
    return {path.split(".0.")[-1] for path in paths if ".1." not in path}


LLAMA_LIKE = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"]
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


def test_the_head_has_a_switch_of_its_own() -> None:
    with pytest.raises(ModelError, match=r"lm_head matches no module .* k_proj, o_proj, q_proj, up_proj, v"):
        add_adapters(tiny("llama", tie_word_embeddings=True), lora("lm_head"), "base")


def test_a_vision_tower_gets_no_adapters() -> None:
    everything = lora("q_proj", "k_proj", "v_proj", "output_proj", mlp=True)
    model = add_adapters(tiny("gemma3"), everything, "base")
    paths = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    assert len(paths) == 2 * len(ATTENTION | MLP)
    assert all(".language_model." in path for path in paths)
    with pytest.raises(ModelError, match="fc1 matches no module of this gemma3 model"):
        add_adapters(tiny("gemma3"), lora("fc1"), "base")


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_request_is_checked_without_weights(kind: str) -> None:
    attention = lora("q_proj", "output_proj", mlp=True)
    with torch.device("meta"):
        untied, tied = (tiny(kind, tie_word_embeddings=tied) for tied in (False, True))
    assert {p.device.type for p in untied.parameters()} == {"meta"}
    expected = target_modules(tiny(kind), attention)
    assert target_modules(untied, attention) == target_modules(tied, attention) == expected
    with pytest.raises(ModelError, match="qq_proj matches no module"):
        target_modules(untied, lora("qq_proj"))
    with pytest.raises(ModelError, match="shares its weight"):
        target_modules(tied, lora("q_proj", output=True))


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


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "transformer.h.0.attn.c_attn"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_an_adapter_computes(path: str, dora: bool) -> None:
    """By the formulas of the papers; rank 3 and alpha 4 make the scale 4 / 3."""
    model = tiny("gpt2" if "attn.c_attn" in path else "qwen2")
    original = model.get_submodule(path)
    weight = original.weight.T if path.endswith("c_attn") else original.weight  # of a Conv1D (in, out)
    weight, bias = weight.detach().clone(), original.bias.detach().clone()
    x = torch.randn(5, 32)
    layer = add_adapters(model, lora("q_proj", dora=dora, rank=3), "base").get_submodule(
        f"base_model.model.{path}"
    )
    assert torch.equal(layer(x), linear(x, weight, bias)) or dora
    torch.testing.assert_close(layer(x), linear(x, weight, bias))  # an untrained adapter changes nothing
    randomize(layer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((3, 32), (len(bias), 3))
    updated = weight + 4 / 3 * b @ a
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert (magnitude - weight.norm(dim=1)).abs().mean() > 0.05  # it was trained too
        updated = magnitude[:, None] * updated / updated.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), linear(x, updated, bias))
    assert (updated - weight).norm() > 0.1 * weight.norm()


@pytest.mark.parametrize(("rank", "expected"), [(1, 4.0), (3, 4 / 3), (64, 1 / 16)])
def test_rank_and_scale(rank: int, expected: float) -> None:
    """Alpha is 4; a rank above the layer's 16 outputs is a waste, and no error."""
    model = add_adapters(tiny("llama"), lora("k_proj", rank=rank), "base")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    assert layer.lora_A["default"].weight.shape == (rank, 32)
    assert layer.lora_B["default"].weight.shape == (16, rank)
    assert layer.scaling["default"] == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * rank * (32 + 16)
