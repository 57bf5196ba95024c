"""Answers by greedy decoding, of a model that may be in the midst of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.data.messages import Message
from lightning_modules.data.tokenize import Tools
from lightning_modules.engine.attention import TREE


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None
) -> list[int]:
    """Tokenize a conversation up to where the answer begins; length n.

    :param tools: functions that the assistant may call, as their JSON schemas.
    """
    text = tokenizer.apply_chat_template(
        list(messages), tools=cast(Any, tools), tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Answer prompts together, each up to an end token.

    :param model: in evaluation mode; left as it is.
    :param prompts: token ids; the shorter ones are padded at their beginning.
    :param max_new_tokens: of the longest answer; fewer where the model has no more positions.
    :returns: the answers without special tokens.
    """
    width, positions = max(map(len, prompts)), max_positions(model)
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens if positions is None else min(max_new_tokens, positions - width),
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    lines = [[tokenizer.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    with _generating(model, greedy):
        output: Any = model.generate(  # type: ignore[operator]
            torch.tensor(lines, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=greedy,
        )
    return [str(text) for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's and those of the model's own generation."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({tokenizer.eos_token_id, *ids} - {None})


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that the model is made for, in tokens; None where it has no limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Lend the model what generation needs.

    transformers fills what ``config`` leaves open from the model's own settings: a penalty on
    repetitions would not be greedy decoding, and sampling's settings bring warnings. And attention along
    trees takes no cache.
    """
    own, attention = model.generation_config, model.config.get_text_config()._attn_implementation
    model.generation_config = config
    if attention == TREE:
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
        model.set_attn_implementation("eager" if capped else "sdpa")  # sdpa has no caps
    try:
        yield
    finally:
        model.generation_config = own
        if attention == TREE:
            model.set_attn_implementation(TREE)
