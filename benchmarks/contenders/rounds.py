"""What every contender shares: the rows, and the talk with the process that runs the rounds.

A contender loads and waits. For each line ``go`` on its standard input it trains one round, every row once,
and answers with one line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-4
RANK, ALPHA = 8, 16
BETA = 0.1


@dataclass(frozen=True)
class Task:
    """What is trained, read from the command line.

    :param method: ``sft`` or ``dpo``.
    :param model: folder with safetensors and a tokenizer.
    :param data: folder of the GSM8K files.
    :param rows: rows or pairs of a round.
    :param batch_size: rows or pairs of an optimizer step.
    :param targets: ``qv`` or ``all``: the projections that get an adapter.
    :param options: the contender's own.
    """

    method: str
    model: str
    data: str
    rows: int
    batch_size: int
    targets: str
    options: dict[str, Any]

    def messages(self) -> list[dict[str, list[dict[str, str]]]]:
        """Return the rows as conversations, in TRL's columns."""
        names = {"sft": ("question", {"completion": "answer"})}
        names["dpo"] = ("prompt", {"chosen": "chosen", "rejected": "rejected"})
        asked, answers = names[self.method]
        return [
            {"prompt": [{"role": "user", "content": row[asked]}]}
            | {name: [{"role": "assistant", "content": row[key]}] for name, key in answers.items()}
            for row in self.raw()
        ]

    def sequences(self, tokenizer: Any) -> list[tuple[list[int], int]]:
        """Return each row's token ids as the chat template lays them out, and how many are the prompt."""
        found = []
        for row in self.messages():
            texts = (
                tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False),
                tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False),
            )
            before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            found.append((ids, len(before)))
        return found

    def raw(self) -> list[dict[str, str]]:
        """Return the rows as they are in the file."""
        name = "gsm8k_train.jsonl" if self.method == "sft" else "gsm8k_preferences.jsonl"
        lines = (Path(self.data) / name).read_text().splitlines()
        return [json.loads(line) for line in lines[: self.rows]]


class Rounds:
    """The contender's side of the talk."""

    def __init__(self) -> None:
        self.task = Task(**json.loads(sys.argv[1]))
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        self._started = 0.0
        self.losses: list[float] = []

    def ready(self, **facts: Any) -> None:
        """Say that everything is loaded."""
        self._answer(facts)

    def wait(self) -> None:
        """Return when the next round is to begin; leave the process when there is none."""
        if sys.stdin.readline().strip() != "go":
            sys.stderr.flush()
            os._exit(0)
        self._started = time.perf_counter()

    def done(self) -> None:
        """Report the round."""
        seconds = time.perf_counter() - self._started
        self._answer({"seconds": seconds, "peak": peak_memory(), "losses": self.losses})
        self.losses = []

    def _answer(self, facts: dict[str, Any]) -> None:
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()

    def each(self) -> Iterator[None]:
        """Yield once for each round."""
        while True:
            self.wait()
            yield
            self.done()


def peak_memory() -> int:
    """Return the most bytes that were in use: of the GPU if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
