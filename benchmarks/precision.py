"""How far bf16 moves log-probabilities from fp32's: ours, and the two ways in which TRL computes.

Losses of a few steps say little: the noise of thousands of tokens cancels in their mean. So each scored token
of GSM8K is compared by itself, one sequence at a time, in the model before any training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.contenders.rounds import Task
from lightning_modules.engine.prepare import speed_up
from lightning_modules.logprobs import token_log_probs

ROWS = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Sequence = tuple[Tensor, int]
"""Token ids (1, s), and how many of them are the prompt."""


def main() -> None:
    """Print the root mean squares, in nats, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--model", required=True, help="folder with safetensors in fp32 and a tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of the GSM8K files")
    options = parser.parse_args()
    print(json.dumps(deviations(options.model, options.data)))


@torch.no_grad()
def deviations(model: str, data: Path) -> dict[str, dict[str, float]]:
    """Return root mean squares by way of computing: ``token``, and ``answer``, summed over each answer."""
    sequences = read(model, data)
    reference = load(model, torch.float32)
    exact = [plain(reference, *sequence) for sequence in sequences]
    found = {}
    for name, (dtype, compute) in WAYS.items():
        loaded = load(model, dtype, attention="eager" if compute is ours else "sdpa")
        if compute is ours:
            speed_up(loaded, "sdpa", max(ids.shape[1] for ids, _ in sequences), device=DEVICE)
        off = [compute(loaded, *row) - target for row, target in zip(sequences, exact, strict=True)]
        found[name] = {
            "token": torch.cat(off).square().mean().sqrt().item(),
            "answer": torch.stack([one.sum() for one in off]).square().mean().sqrt().item(),
        }
    return found


def read(model: str, data: Path) -> list[Sequence]:
    """Return the first rows of GSM8K as the chat template lays them out."""
    task = Task("sft", model, str(data), ROWS, 1, "qv", {})
    found = task.sequences(AutoTokenizer.from_pretrained(model))
    return [(torch.tensor([ids], device=DEVICE), prompt) for ids, prompt in found]


def load(model: str, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """Return the model in evaluation mode."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=attention)
    return cast(PreTrainedModel, loaded.to(DEVICE).eval())


def plain(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Compute the answer's log-probabilities (n) from transformers' logits."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, prompt:, None]).squeeze(1)


def under_autocast(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Compute them as TRL does by default: fp32 weights, products in bf16."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        return plain(model, ids, prompt)


def ours(model: PreTrainedModel, ids: Tensor, prompt: int) -> Tensor:
    """Compute them as the product's modules do."""
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, prompt - 1 : -1]
    return token_log_probs(hidden, ids[0, prompt:], head, model.config)


WAYS: dict[str, tuple[torch.dtype, Callable[..., Tensor]]] = {
    "TRL default": (torch.float32, under_autocast),
    "TRL best, bf16 weights": (torch.bfloat16, plain),
    "ours": (torch.bfloat16, ours),
}

if __name__ == "__main__":
    main()
