"""A checkpoint's model card: what it is, what it was made from, what was measured, how it is loaded.

Reference: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from post_training.schemas.jobs import PostTrainingMetric

CARD_FILE = "README.md"
"""Where people and the hub look for it."""

MODEL_FILE = "MLmodel"
"""Where MLflow looks for what it is."""


@dataclass(frozen=True)
class TrainedOn:
    """A data set of a job.

    :param context: training or validation.
    :param name: as people may see it.
    :param digest: SHA-256 of its content.
    """

    context: str
    name: str
    digest: str
    rows: int


@dataclass(frozen=True)
class Facts:
    """What is the same in all checkpoints of a job.

    :param method: what it learned from, in words.
    :param weights: what of the model was trained, in words.
    :param base: name of the model that it started from.
    :param base_source: where transformers finds an adapter's base on the machine that trained.
    :param run_id: MLflow's id of the job's run; None without a record.
    :param settings: the request's fields by dotted path, and what the trainer made of those left open.
    """

    job_uuid: str
    method: str
    weights: str
    base: str
    base_source: str
    run_id: str | None
    data: Sequence[TrainedOn]
    settings: Mapping[str, Any]


def model_card(facts: Facts, metrics: PostTrainingMetric, *, is_adapter: bool) -> str:
    """Write the card of one checkpoint as Markdown, its metadata in front; parameters as of ``card_text``."""
    on_hub = not facts.base.startswith("/") and ":" not in facts.base
    metadata = ModelCardData(
        base_model=facts.base if on_hub else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["post-training", facts.method],
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{card_text(facts, metrics, is_adapter=is_adapter)}"


def card_text(facts: Facts, metrics: PostTrainingMetric, *, is_adapter: bool) -> str:
    """Write what people read of the card.

    :param metrics: the checkpoint's.
    :param is_adapter: whether it is an adapter, and no model that loads by itself.
    """
    parts = [
        f"# {facts.job_uuid}, epoch {metrics.epoch}",
        _summary(facts, is_adapter=is_adapter),
        "## Measured",
        _table(["", "value"], _measured(metrics)),
        "## Data",
        _table(
            ["", "name", "rows", "SHA-256"],
            [[each.context, f"`{each.name}`", each.rows, f"`{each.digest}`"] for each in facts.data],
        ),
        "## How to load it",
        *_loading(facts, is_adapter=is_adapter),
        "## Settings",
        _table(["field", "value"], [[f"`{path}`", f"`{value}`"] for path, value in facts.settings.items()]),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _summary(facts: Facts, *, is_adapter: bool) -> str:
    made = "An adapter for" if is_adapter else "A model made from"
    recorded = f" MLflow has the job as run `{facts.run_id}`." if facts.run_id else ""
    return f"{made} `{facts.base}`: {facts.method} of {facts.weights}.{recorded}"


def _measured(metrics: PostTrainingMetric) -> list[list[object]]:
    values = {
        "training loss, mean of the epoch": metrics.train_loss,
        "validation loss": metrics.validation_loss,
        "perplexity": metrics.perplexity,
    }
    return [
        [name, "not a finite number" if value is None else f"{value:.4f}"] for name, value in values.items()
    ]


def _loading(facts: Facts, *, is_adapter: bool) -> Iterator[str]:
    """Yield the section's paragraphs; FOLDER is where the card lies."""
    if facts.run_id is not None:
        yield _code(
            "import mlflow",
            "",
            'chat = mlflow.transformers.load_model("FOLDER")  # or its address in MLflow, models:/m-…',
            'chat([{"role": "user", "content": "…"}], max_new_tokens=64)',
        )
        if is_adapter:
            yield (
                f"The base model is read from `{facts.base_source}`. Where that does not exist, give a folder"
                " with it as `base_model_path`."
            )
        yield "Or without MLflow:"
    yield _code(*(_with_peft(facts.base_source) if is_adapter else _WITH_TRANSFORMERS))


_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
_WITH_TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    _TOKENIZER,
)


def _with_peft(base: str) -> tuple[str, ...]:
    return (
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
        'model = PeftModel.from_pretrained(model, "FOLDER")',
        _TOKENIZER,
    )


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    """Keep a value on its line and in its column."""
    return " ".join(str(value).split()).replace("|", "\\|")
