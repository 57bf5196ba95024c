"""Models side by side, against transformers and peft on one sequence at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_modules.evaluation import evaluate
from lightning_modules.models import save_model
from lightning_modules.quantization import quantized_copy
from post_training.errors import DataError, ModelError
from post_training.schemas.algorithms import QATFinetuningConfig
from post_training.schemas.evaluation import EvaluationSpec
from tests.lightning_modules.tiny import PAIRS, ROWS
from tests.tiny_model import write_tiny_model

BETA = 0.3
SpecMaker = Callable[..., EvaluationSpec]


@pytest.fixture
def make_spec(tiny_model_dir: Path, rows_file: Path, tmp_path: Path) -> SpecMaker:
    """Make a spec of the tiny model; keywords change its configuration, ``models`` and paths the spec."""

    def make(models: Mapping[str, Any] = {}, paths: Mapping[str, Any] = {}, **config: Any) -> EvaluationSpec:
        measured = {"dataset_id": "rows", "dtype": "fp32", "batch_size": 3, "beta": BETA} | config
        fields = {
            "config": measured,
            "models": {name: str(model) for name, model in (models or {"base": tiny_model_dir}).items()},
            "model_roots": (tmp_path, tiny_model_dir.parent),
            "data": str(rows_file),
            "work_dir": tmp_path,
        }
        return EvaluationSpec.model_validate(fields | dict(paths))

    return make


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder with adapters that change much."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def log_prob(model: Any, tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[float, int]:
    """Log-probability of an answer's tokens, through the one that ends it."""
    asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
    ids = tokenizer(f"{asked}{answer}<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(input_ids=ids).logits.double().log_softmax(-1)
    of_tokens = found[0, :-1].gather(1, ids[0, 1:, None])[start - 1 :]
    return float(of_tokens.sum()), len(of_tokens)


def plain(model_dir: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()


def test_losses_are_those_of_transformers_and_peft(
    make_spec: SpecMaker, tiny_model_dir: Path, adapter: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = make_spec({"base": tiny_model_dir, "candidate": adapter})
    found = evaluate(spec)
    for name, model in (("base", plain(tiny_model_dir)), ("candidate", plain(tiny_model_dir, adapter))):
        expected = [log_prob(model, tokenizer, row["question"], row["answer"]) for row in ROWS]
        assert found.values[name].nll == pytest.approx([-value for value, _ in expected], rel=1e-5)
        assert found.values[name].tokens == [count for _, count in expected]
        loss = -sum(value for value, _ in expected) / sum(count for _, count in expected)
        metrics = found.values[name].metrics()
        assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics["perplexity"] == pytest.approx(2.718281828459045**loss, rel=1e-5)
        assert metrics.keys() == {"loss", "perplexity"}
    assert found.values["base"].nll != pytest.approx(found.values["candidate"].nll, rel=1e-2)


def test_rewards_are_relative_to_the_first_model(
    make_spec: SpecMaker,
    tiny_model_dir: Path,
    adapter: Path,
    pairs_file: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    spec = make_spec(
        {"base": tiny_model_dir, "candidate": adapter},
        {"preference_data": str(pairs_file)},
        preference_dataset_id="pairs",
    )
    found = evaluate(spec)
    policy, reference = plain(tiny_model_dir, adapter), plain(tiny_model_dir)
    margins = []
    for pair in PAIRS:
        ratios = [
            log_prob(policy, tokenizer, pair["prompt"], pair[which])[0]
            - log_prob(reference, tokenizer, pair["prompt"], pair[which])[0]
            for which in ("chosen", "rejected")
        ]
        margins.append(BETA * (ratios[0] - ratios[1]))
    values = found.values["candidate"]
    assert values.reward_margin == pytest.approx(margins, abs=1e-5)
    assert values.metrics()["reward_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-6)
    assert values.metrics()["reward_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert found.values["base"].reward_margin == [0.0] * len(PAIRS)


def test_answers_are_compared_by_the_pattern(
    make_spec: SpecMaker, tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    pattern = {"pattern": r"\S+", "max_new_tokens": 12, "max_examples": 4}
    spoken = evaluate(make_spec(exact_match=pattern)).answers["base"]
    assert set(spoken) == {1, 2, 3, 4}
    rows = [
        {"question": ROWS[0]["question"], "answer": f"entirely other, but {spoken[1].split()[-1]}"},
        {"question": ROWS[1]["question"], "answer": "never said"},
    ]
    (tmp_path / "own.jsonl").write_text("\n\n".join(map(json.dumps, rows)))  # the second row is line 3
    found = evaluate(make_spec(paths={"data": str(tmp_path / "own.jsonl")}, exact_match=pattern))
    assert found.values["base"].correct == [True, False]
    assert found.values["base"].metrics()["exact_match"] == 0.5
    assert list(found.questions) == [1, 3]
    assert found.answers["base"] == {1: spoken[1], 3: spoken[2]}


def test_only_rows_that_all_models_take_are_compared(
    make_spec: SpecMaker, tiny_model_dir: Path, tmp_path: Path
) -> None:
    short = write_tiny_model(tmp_path / "short", max_position_embeddings=30)
    models = {"base": tiny_model_dir, "short": short}
    with pytest.raises(DataError, match=r"rows of .* are bad and config\.max_bad_row_fraction is 0"):
        evaluate(make_spec(models))
    found = evaluate(make_spec(models, max_bad_row_fraction=0.9))
    alone = evaluate(make_spec()).values["base"]
    kept = [alone.nll.index(value) for value in found.values["base"].nll]
    assert 0 < len(kept) < len(ROWS)
    assert kept == sorted(kept)
    assert len(found.values["short"].nll) == len(kept)


def test_the_first_rows_are_enough(make_spec: SpecMaker) -> None:
    whole, part = (evaluate(make_spec(max_examples=limit)).values["base"] for limit in (None, 4))
    assert part.nll == pytest.approx(whole.nll[:4])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_quantized_checkpoint_is_measured_as_it_is(
    dtype: str, make_spec: SpecMaker, tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    config = QATFinetuningConfig(type="QAT", quantizer_name="int4_weight_only", group_size=32)
    quantized = quantized_copy(plain(tiny_model_dir), config)
    save_model(quantized, tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    spec = make_spec({"quantized": tmp_path / "quantized"})
    spec.config.dtype = dtype  # of the models that are not quantized
    found = evaluate(spec).values["quantized"]
    expected = [-log_prob(quantized, tokenizer, row["question"], row["answer"])[0] for row in ROWS]
    assert found.nll == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_loaded_is_named(make_spec: SpecMaker, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        evaluate(make_spec({"base": tmp_path / "nowhere"}))
