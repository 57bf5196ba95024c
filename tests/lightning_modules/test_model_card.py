"""A checkpoint's model card, read as the hub reads it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from lightning_modules.model_card import Facts, TrainedOn, model_card
from tests.lightning_modules.recorded import EPOCH_0

FACTS = Facts(
    job_uuid="nightly",
    method="supervised fine-tuning",
    weights="low-rank adapters (LoRA)",
    base="org/base",
    base_source="org/base",
    run_id="0123abcd",
    data=[TrainedOn("training", "rows.jsonl", "ab" * 32, 12)],
    settings={"algorithm_config.rank": 4, "runtime.seed": 7},
)


def read(facts: Facts, *, is_adapter: bool = True) -> ModelCard:
    return ModelCard(model_card(facts, EPOCH_0, is_adapter=is_adapter))


def test_says_what_it_is_to_machines() -> None:
    data = read(FACTS).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/base", "peft", "text-generation")
    assert read(FACTS, is_adapter=False).data.library_name == "transformers"


@pytest.mark.parametrize("base", ["/models/base.gguf", "models:/m-12"])
def test_only_a_base_on_the_hub_is_linked(base: str) -> None:
    card = read(replace(FACTS, base=base))
    assert card.data.base_model is None
    assert f"`{base}`" in card.text


def test_says_what_was_measured_trained_and_asked_for() -> None:
    text = read(FACTS).text
    assert "# nightly, epoch 0" in text
    assert "run `0123abcd`" in text
    assert "| training loss, mean of the epoch | 1.5000 |" in text
    assert "| perplexity | 7.3891 |" in text
    assert f"| training | `rows.jsonl` | 12 | `{'ab' * 32}` |" in text
    assert "| `algorithm_config.rank` | `4` |" in text


def test_a_loss_that_is_no_number_is_said_in_words() -> None:
    metrics = EPOCH_0.model_copy(update={"validation_loss": None})
    assert "| validation loss | not a finite number |" in model_card(FACTS, metrics, is_adapter=True)


def test_a_value_keeps_to_its_cell() -> None:
    text = read(replace(FACTS, settings={"checkpoint_dir": "a|b\nc"})).text
    assert "| `checkpoint_dir` | `a\\|b c` |" in text


def test_a_job_without_a_record_is_not_loaded_through_mlflow() -> None:
    text = read(replace(FACTS, run_id=None)).text
    assert "mlflow" not in text.lower()
    assert 'PeftModel.from_pretrained(model, "FOLDER")' in text
    assert "peft" not in read(replace(FACTS, run_id=None), is_adapter=False).text
