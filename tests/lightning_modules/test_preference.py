"""Preference optimization against a plain loop that is written out here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_modules.job import prepare_job
from lightning_modules.record import open_record
from post_training.schemas.trainer import CACHE_FOLDER, TrainerSpec
from tests.lightning_modules.plain import plain_steps
from tests.lightning_modules.tiny import LORA, PAIRS

Run = Callable[..., Any]
LR, BETA = 0.01, 0.5
PREFERENCE = {"beta": BETA}


def answer_log_prob(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> tuple[torch.Tensor, int]:
    """Sum of the answer's log-probabilities through its end token, and its number of tokens."""
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(f"{text}{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    tokens = [logits[position - 1, ids[position]] for position in range(start, len(ids))]
    return torch.stack(tokens).sum(), len(tokens)


def plain_training(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, lora: bool, step_pairs: int
) -> tuple[list[float], list[float], list[float]]:
    """Train one epoch in file order; returns the losses, the margins, and the chosen answers' perplexity."""
    pl.seed_everything(7, verbose=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = copy.deepcopy(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    steps = math.ceil(len(PAIRS) / step_pairs)
    losses, margins = [], []
    for step in plain_steps(model, lr=LR, weight_decay=0.1, steps=steps):
        pairs = PAIRS[(step - 1) * step_pairs : step * step_pairs]
        rewards = []
        for pair in pairs:
            for answer in (pair["chosen"], pair["rejected"]):
                ours, _ = answer_log_prob(model, tokenizer, pair["prompt"], answer)
                with torch.no_grad():
                    theirs, _ = answer_log_prob(reference, tokenizer, pair["prompt"], answer)
                rewards.append(BETA * (ours - theirs))
        margin = torch.stack(rewards[0::2]) - torch.stack(rewards[1::2])
        loss = -functional.logsigmoid(margin).mean()
        loss.backward()
        losses.append(loss.item())
        margins.append(margin.mean().item())
    nll = [answer_log_prob(model, tokenizer, pair["prompt"], pair["chosen"]) for pair in PAIRS[:2]]
    perplexity = math.exp(-sum(total.item() for total, _ in nll) / sum(count for _, count in nll))
    return losses, margins, [perplexity]


@pytest.mark.parametrize(
    ("lora", "accumulation", "changes"),
    [
        (True, 1, {}),
        (True, 1, {"runtime": {"reference_logprobs": "live"}}),
        (True, 2, {}),
        (False, 1, {}),
        (False, 2, {"runtime": {"attn_implementation": "eager"}}),
    ],
    ids=["lora", "live", "accumulated", "full", "full-eager"],
)
def test_equals_a_plain_loop(
    lora: bool,
    accumulation: int,
    changes: dict[str, Any],
    make_spec: Any,
    run: Run,
    read_metrics: Any,
    tiny_model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    spec = make_spec(
        preference=PREFERENCE,
        algorithm=LORA if lora else None,
        training={"gradient_accumulation_steps": accumulation},
        **changes,
    )
    run(spec)
    losses, margins, perplexity = plain_training(
        tiny_model_dir, tokenizer, lora=lora, step_pairs=2 * accumulation
    )
    assert read_metrics(spec.work_dir, "train_loss") == pytest.approx(losses, rel=1e-4)
    assert read_metrics(spec.work_dir, "rewards/margins") == pytest.approx(margins, rel=1e-3, abs=1e-5)
    assert read_metrics(spec.work_dir, "perplexity")[1:] == pytest.approx(perplexity, rel=1e-4)


def test_packed_pairs_train_like_single_ones(
    make_spec: Any, run: Run, read_metrics: Any, tmp_path: Path
) -> None:
    losses = []
    for packed in (False, True):
        spec = make_spec(
            preference=PREFERENCE,
            training={"n_epochs": 2},
            data={"packed": packed, "batch_size": 10},
            work_dir=tmp_path / str(packed),
        )
        run(spec)
        losses.append(read_metrics(spec.work_dir, "train_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def test_the_first_rewards_are_zero_and_the_last_prefer_the_chosen(
    make_spec: Any, run: Run, read_metrics: Any
) -> None:
    spec = make_spec(preference=PREFERENCE, training={"n_epochs": 4, "max_validation_steps": None})
    run(spec)

    def read(name: str) -> list[float]:
        return list(read_metrics(spec.work_dir, name))

    assert read("train_loss")[0] == pytest.approx(math.log(2), rel=1e-5)
    assert read("kl")[0] == pytest.approx(0, abs=1e-6)
    assert read("validation_rewards/chosen")[0] == pytest.approx(0, abs=1e-5)
    assert read("validation_rewards/accuracies")[-1] == 1
    assert read("validation_rewards/margins")[-1] > 0.5
    assert read("validation_kl")[-1] > 0
    margins = [c - r for c, r in zip(read("rewards/chosen"), read("rewards/rejected"), strict=True)]
    assert read("rewards/margins") == pytest.approx(margins, abs=1e-5)


def test_clipped_rewards_are_counted(make_spec: Any, run: Run, read_metrics: Any) -> None:
    clip = 0.05
    spec = make_spec(preference=PREFERENCE | {"reward_clip": clip}, training={"n_epochs": 4})
    run(spec)
    clipped = read_metrics(spec.work_dir, "rewards/clipped_fraction")
    assert clipped[0] == 0
    assert clipped[-1] > 0
    assert max(map(abs, read_metrics(spec.work_dir, "rewards/chosen"))) <= clip + 1e-6


def test_references_are_computed_once_and_kept_for_a_retry(make_spec: Any) -> None:
    spec = make_spec(preference=PREFERENCE, training={"n_epochs": 2}, data={"shuffle": True})
    job = prepare_job(spec, open_record(spec))
    job.run()
    (file,) = references_of(spec)
    shard = job.data.train_loader.shards[0]
    saved = load_file(file)["log_probs"]
    pairs = [shard[index] for index in range(len(shard))]
    assert len(saved) == sum(sequence.scored for pair in pairs for sequence in pair.sequences)
    assert not saved.isnan().any()
    written = file.stat().st_mtime_ns
    prepare_job(spec, open_record(spec)).run()
    assert references_of(spec) == [file]
    assert file.stat().st_mtime_ns == written


def references_of(spec: TrainerSpec) -> list[Path]:
    return list((spec.work_dir / CACHE_FOLDER / "references").rglob("*.safetensors"))


def test_another_model_and_another_type_have_references_of_their_own(
    make_spec: Any, run: Run, tmp_path: Path, dropout_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # slow where the processor has no instructions for it, but another type all the same
    monkeypatch.setattr("lightning_modules.models._has_bf16", lambda device: True)
    common: dict[str, Any] = {"preference": PREFERENCE, "cache_dir": tmp_path / "cache"}
    once = {"max_steps_per_epoch": 1}
    changes: list[dict[str, Any]] = [{}, {"model": dropout_model}, {"training": once | {"dtype": "bf16"}}, {}]
    for number, change in enumerate(changes):
        run(make_spec(**({"training": once, "work_dir": tmp_path / str(number)} | common | change)))
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 3


def test_adapters_need_no_second_model(make_spec: Any) -> None:
    spec = make_spec(preference=PREFERENCE, runtime={"reference_logprobs": "live"})
    job = prepare_job(spec, open_record(spec))
    job.run()
    assert not references_of(spec)
    total = sum(p.numel() for p in job.module.parameters())
    trained = sum(p.numel() for p in job.module.parameters() if p.requires_grad)
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(spec.model).parameters())
    assert total == base + trained


@pytest.mark.parametrize("reference", ["precomputed", "live"])
def test_dropout_does_not_look_like_a_distance_from_the_reference(
    reference: str, make_spec: Any, run: Run, read_metrics: Any, dropout_model: str
) -> None:
    runtime = {"reference_logprobs": reference}
    spec = make_spec(preference=PREFERENCE, runtime=runtime, model=dropout_model)
    run(spec)
    assert read_metrics(spec.work_dir, "train_loss")[0] == pytest.approx(math.log(2), rel=1e-5)
