"""Adapters of the tiny model, written and found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from torch import Tensor

from lightning_modules.adapters import add_adapters
from lightning_modules.base_model import Base, find_base
from lightning_modules.models import load_model
from post_training.schemas.algorithms import LoraFinetuningConfig
from post_training.schemas.trainer import TrackingTarget
from tests.lightning_modules.tiny import LORA

IDS = torch.arange(12)[None]


def load(source: str | Path) -> Any:
    """Load a model in fp32."""
    return load_model(str(source), dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Compute the logits of twelve tokens, without dropout."""
    answer: Tensor = model.eval()(input_ids=IDS).logits
    return answer


def lora(**changes: Any) -> LoraFinetuningConfig:
    """Return the configuration of the tests' adapters, changed."""
    return LoraFinetuningConfig.model_validate(LORA | changes)


def adapt(model: Any, base: str, seed: int, **changes: Any) -> Any:
    """Add adapters with weights that change the model."""
    adapted = add_adapters(model, lora(**changes), base)
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def write_adapter(folder: Path, model: Path, *, seed: int = 1, **changes: Any) -> Path:
    """Write an adapter of a model; keywords change its configuration."""
    adapt(load(model), str(model), seed).save_pretrained(str(folder), save_embedding_layers=False)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def find(model: str | Path, tmp_path: Path, *roots: Path, tracking: TrackingTarget | None = None) -> Base:
    """Find a base, downloads going below the test's folder."""
    return find_base(str(model), tmp_path / "base", tracking, roots)


def write_gguf(model: Any, path: Path, tokens: Sequence[str] = (), merges: Sequence[str] = ("a b",)) -> None:
    """Write a Llama as a gguf file with fp32 weights; its q and k may be permuted, which is no matter.

    :param tokens: of its tokenizer, the last one ends a sequence; without, it has none.
    :param merges: two tokens each, with a blank between them.
    """
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    parts = {"embed_tokens": "token_embd", "norm": "output_norm"} | {
        f"layers.{i}.{name}": f"blk.{i}.{short}"
        for i in range(config.num_hidden_layers)
        for name, short in names.items()
    }
    for name, short in parts.items():
        writer.add_tensor(f"{short}.weight", model.model.get_submodule(name).weight.detach().numpy())
    writer.add_tensor("output.weight", model.lm_head.weight.detach().numpy())
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
        writer.add_eos_token_id(len(tokens) - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
