"""What is replaced in which architecture, and what stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2Config

from lightning_modules.engine.attention import TREE
from lightning_modules.engine.prepare import speed_up
from lightning_modules.probes import alone
from post_training.errors import ModelError
from tests.lightning_modules.test_probes import CONFIGS, RECURRENT
from tests.lightning_modules.tiny import SHAPE, TINY

GATED = {"llama", "qwen2", "mistral", "gemma", "gemma2", "cohere", "granite", "olmo"}
POST_NORM = Olmo2Config(**SHAPE, tie_word_embeddings=False)
"""Attention and feed-forward layers take the residual stream itself, and norms what they return."""


def tiny(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval()


def replaced(model: Any) -> set[str]:
    """The files of the classes that took a module over."""
    modules = {type(module).__module__ for module in model.modules()}
    return {name.rpartition(".")[2] for name in modules if name.startswith("lightning_modules.engine")}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_architecture_takes_trees_and_its_own_replacements(kind: str) -> None:
    model = tiny(CONFIGS[kind])
    expected = alone(model)
    assert speed_up(model, "sdpa", 64)
    assert model.config._attn_implementation == TREE
    # Cohere's and OLMo's norms have formulas of their own.
    norms = {"norms"} if kind not in ("cohere", "olmo") else set()
    assert replaced(model) == norms | ({"gating"} if kind in GATED else set())
    torch.testing.assert_close(alone(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_the_residual_stream_of_a_bf16_model_is_fp32(kind: str) -> None:
    model = tiny(TINY[kind], torch.bfloat16)
    exact = tiny(TINY[kind])
    exact.load_state_dict(model.state_dict())
    coarse = alone(model).float() - alone(exact)
    assert speed_up(model, "sdpa", 64)
    states = alone(model)
    assert states.dtype == torch.float32
    assert float((states - alone(exact)).norm()) < float(coarse.norm())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = torch.arange(8)[None]
    assert model(input_ids=ids, use_cache=False).logits.dtype == torch.bfloat16
    model.set_attn_implementation("eager")
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 12)


def test_where_layers_take_the_stream_itself_it_keeps_its_type() -> None:
    model = tiny(POST_NORM, torch.bfloat16)
    assert speed_up(model, "sdpa", 64)
    assert replaced(model) == {"norms", "gating"}
    assert alone(model).dtype == torch.bfloat16


def test_eager_attention_stays_if_it_is_asked_for() -> None:
    model = tiny(TINY["llama"])
    assert not speed_up(model, "eager", 64)
    assert model.config._attn_implementation == "eager"
    assert replaced(model) == {"norms", "gating"}


def test_a_window_that_attention_is_not_told_of_is_no_tree() -> None:
    config = copy.deepcopy(TINY["llama"])
    config.sliding_window = 16
    assert not speed_up(tiny(config), "sdpa", 17)
    assert speed_up(tiny(config), "sdpa", 16)


def test_attention_in_chunks_is_no_tree() -> None:
    config = copy.deepcopy(TINY["llama"])
    config.attention_chunk_size = 16
    model = tiny(config)
    assert not speed_up(model, "sdpa", 17)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_computes_something_else_then_is_left_as_it_was() -> None:
    model = tiny(RECURRENT)
    expected = alone(model)
    assert not speed_up(model, "eager", 64)
    torch.testing.assert_close(alone(model), expected)


def test_what_knows_eager_attention_only_says_so() -> None:
    model = tiny(TINY["gemma2"])
    model.config.attention_chunk_size = 16
    with pytest.raises(ModelError, match=r"gemma2 need runtime\.attn_implementation eager"):
        speed_up(model, "sdpa", 64)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trees_have_no_dropout_on_a_gpu(device: str) -> None:
    config = copy.deepcopy(TINY["gpt2"])
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.1
    trees = speed_up(tiny(config), "sdpa", 64, device=device)
    assert trees == (device == "cpu")
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    assert speed_up(tiny(config), "sdpa", 64, device=device)
