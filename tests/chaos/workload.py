"""What the jobs train: a tiny model, its data, and one request for each kind of job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.requests_of import PLAIN_END
from tests.tiny_model import write_tiny_model

LORA = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": False,
    "rank": 4,
    "alpha": 8,
}
BATCH_SIZE, ACCUMULATION = 8, 2
VALIDATION_BATCHES = 2


@dataclass(frozen=True)
class Kind:
    """A request that several jobs share, apart from their ids.

    :param method: the route's name.
    :param epochs: how many, each with the workload's steps.
    :param fields: of the request, above those that all kinds share.
    """

    method: str
    epochs: int
    fields: dict[str, Any]


KINDS = {
    "lora": Kind("supervised-fine-tune", 3, {"algorithm_config": LORA}),
    "full": Kind("supervised-fine-tune", 2, {"algorithm_config": None}),
    "dpo": Kind(
        "preference-optimize",
        2,
        {"algorithm_config": {"beta": 0.5, "loss_type": "sigmoid"}, "runtime": {"adapter": LORA}},
    ),
}


@dataclass(frozen=True)
class Workload:
    """Files and sizes of all jobs.

    :param folder: holds the model and the data.
    :param steps: optimizer steps of each epoch.
    """

    folder: Path
    steps: int

    def write(self) -> None:
        """Write the model and as many rows as an epoch takes."""
        self.folder.mkdir(parents=True)
        write_tiny_model(self.folder / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=4)
        count = self.steps * BATCH_SIZE * ACCUMULATION
        questions = [f"How many are {i} apples? {'Count! ' * (i % 7)}" for i in range(count)]
        rows = [(question, f"There are {i} apples.") for i, question in enumerate(questions)]
        write_rows(self.folder / "train.jsonl", [{"question": q, "answer": a} for q, a in rows])
        pairs = [
            {"prompt": q, "chosen": a, "rejected": f"I cannot say, {i}."} for i, (q, a) in enumerate(rows)
        ]
        write_rows(self.folder / "pairs.jsonl", pairs)

    def body(self, kind: str, job_uuid: str) -> dict[str, Any]:
        """Return the request of a job."""
        dpo = KINDS[kind].method == "preference-optimize"
        data = {
            "dataset_id": str(self.folder / ("pairs.jsonl" if dpo else "train.jsonl")),
            "batch_size": BATCH_SIZE,
            "shuffle": True,
            "data_format": "instruct",
        }
        training = {
            "n_epochs": KINDS[kind].epochs,
            "max_steps_per_epoch": self.steps,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_validation_steps": VALIDATION_BATCHES,
            "dtype": "fp32",
            "data_config": data,
        }
        fields = KINDS[kind].fields
        return {
            "job_uuid": job_uuid,
            "finetuned_model" if dpo else "model": str(self.folder / "model"),
            "training_config": training,
            "hyperparam_search_config": {},
            "logger_config": dict(PLAIN_END),
            **fields,
            "runtime": {"save_every_n_steps": 2, **fields.get("runtime", {})},
        }


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
