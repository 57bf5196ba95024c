"""Constants of the tiny model and its data."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LORA = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "apply_lora_to_mlp": False,
    "apply_lora_to_output": False,
    "rank": 4,
    "alpha": 8,
}


def words(i: int) -> str:
    """A question whose length varies with its number."""
    return " ".join(["how many apples are in", "the red basket of", "my friend"][: i % 3 + 1]) + f" {i}?"


ROWS = [
    {"question": words(i), "answer": f"There are {i * 7 % 10} apples" + " now" * (i % 4)} for i in range(10)
]

PAIRS = [
    {
        "prompt": words(i),
        "chosen": f"There are {i * 7 % 10} apples" + " now" * (i % 4),
        "rejected": f"I do not know {i}" + " sorry" * (i % 3),
    }
    for i in range(10)
]


def tiny_llama(vocab_size: int = 400, **changes: Any) -> LlamaConfig:
    """The configuration of the tiny model."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaConfig(vocab_size=vocab_size, **(shape | heads | changes))


SHAPE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "pad_token_id": 0,
}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
UNTIED = SHAPE | {"tie_word_embeddings": False}
TINY: dict[str, PretrainedConfig] = {
    "llama": tiny_llama(),
    "qwen2": Qwen2Config(**UNTIED),
    "mistral": MistralConfig(**UNTIED, sliding_window=8),
    "gemma": GemmaConfig(**UNTIED),
    "gemma2": Gemma2Config(**UNTIED, query_pre_attn_scalar=8, sliding_window=8, final_logit_softcapping=5.0),
    "gpt2": GPT2Config(
        **NO_DROPOUT,
        vocab_size=400,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        tie_word_embeddings=False,
    ),
    "phi3": Phi3Config(**(UNTIED | {"num_key_value_heads": 4})),
}
