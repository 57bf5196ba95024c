"""A two-layer Llama and a tokenizer of 400 tokens, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.lightning_modules.tiny import CHATML, ROWS, tiny_llama


def train_tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level BPE with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for row in ROWS for text in row.values()], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
    )


def write_tiny_model(folder: Path, **shape: int) -> Path:
    """Write the model, always with the same weights, and its tokenizer; return the folder.

    :param shape: fields of its configuration that differ.
    """
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama(len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
