"""The loop that people write: transformers and peft, padded batches, the model's own loss."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contenders.rounds import ALPHA, LEARNING_RATE, RANK, Rounds


def main() -> None:
    """Train until no more rounds are asked for."""
    rounds = Rounds()
    task = rounds.task
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16)
    targets = ["q_proj", "v_proj"] if task.targets == "qv" else "all-linear"
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model.to(device), config).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    rows = [(ids, [-100] * prompt + ids[prompt:]) for ids, prompt in task.sequences(tokenizer)]
    rounds.ready()
    for _ in rounds.each():
        for start in range(0, len(rows), task.batch_size):
            batch = rows[start : start + task.batch_size]
            width = max(len(ids) for ids, _ in batch)
            padded = {
                "input_ids": [ids + [0] * (width - len(ids)) for ids, _ in batch],
                "labels": [labels + [-100] * (width - len(labels)) for _, labels in batch],
                "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch],
            }
            tensors = {name: torch.tensor(values, device=device) for name, values in padded.items()}
            loss = adapted(**tensors, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rounds.losses.append(loss.item())


if __name__ == "__main__":
    main()
