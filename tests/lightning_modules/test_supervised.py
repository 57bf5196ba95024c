"""The training loop against a plain one that is written out here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_modules import module
from lightning_modules.data.batches import Arrangement, collate
from lightning_modules.data.packing import pack
from lightning_modules.data.tokenize import Example
from lightning_modules.engine.prepare import speed_up
from lightning_modules.supervised import SupervisedFineTuning
from post_training.errors import DivergenceError
from tests.lightning_modules.plain import plain_steps
from tests.lightning_modules.tiny import LORA, ROWS, TINY

Run = Callable[..., Any]
ATTENTION = [(kind, "eager") for kind in TINY] + [(kind, "sdpa") for kind in TINY if kind != "gemma2"]
"""Gemma 2 caps its attention scores, which sdpa cannot."""
FAST = "fast"
ARRANGED = [(*one, Arrangement.PACKED) for one in ATTENTION] + [
    (kind, FAST, arrangement) for kind in TINY for arrangement in (Arrangement.FLAT, Arrangement.TREE)
]
LR, DECAY = 0.01, 0.1
ACTIVATION_CHECKPOINTING = "enable_activation_checkpointing"


def encode(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, str], train_on_input: bool
) -> tuple[list[int], int]:
    """Token ids of a ChatML conversation, and how many of them are the prompt."""
    prompt = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt + row["answer"] + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return ids, 1 if train_on_input else len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def plain_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], on_input: bool
) -> Any:
    """Mean cross-entropy of the scored tokens, one row at a time, through the whole model."""
    losses = []
    for row in rows:
        ids, start = encode(tokenizer, row, on_input)
        end = len(ids) if on_input else len(ids) - 1  # the newline after the end token is not written
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        losses.append(
            functional.cross_entropy(
                logits[start - 1 : end - 1], torch.tensor(ids[start:end]), reduction="none"
            )
        )
    return torch.cat(losses).mean()


def plain_training(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lora: bool,
    step_rows: int,
    on_input: bool,
    attention: str,
) -> tuple[Any, list[float], list[float]]:
    """Train one epoch in file order; returns the model, the losses and the gradient norms."""
    pl.seed_everything(7, verbose=False)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = math.ceil(len(ROWS) / step_rows)
    losses, norms = [], []
    for step in plain_steps(model, lr=LR, weight_decay=DECAY, steps=steps):
        rows = ROWS[(step - 1) * step_rows : step * step_rows]
        loss = plain_loss(model, tokenizer, rows, on_input)
        loss.backward()
        losses.append(loss.item())
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in trained if p.grad is not None)))
    return model, losses, norms


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("on_input", [False, True], ids=["answers", "all"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_a_plain_loop(
    lora: bool,
    accumulation: int,
    on_input: bool,
    attention: str,
    make_spec: Any,
    run: Run,
    read_metrics: Any,
    tiny_model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    spec = make_spec(
        training={"gradient_accumulation_steps": accumulation},
        data={"train_on_input": on_input},
        runtime={"attn_implementation": attention},
        algorithm=LORA if lora else None,
    )
    run(spec)
    model, losses, norms = plain_training(
        tiny_model_dir,
        tokenizer,
        lora=lora,
        step_rows=2 * accumulation,
        on_input=on_input,
        attention=attention,
    )
    assert read_metrics(spec.work_dir, "train_loss") == pytest.approx(losses, rel=1e-5)
    assert read_metrics(spec.work_dir, "gradient_norm") == pytest.approx(norms, rel=1e-4)
    folder = spec.work_dir / "checkpoints" / "epoch-0"
    saved = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
    expected = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == expected.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-3, atol=1e-5)


LENGTHS = (29, 34, 23, 40, 11, 5, 2)


def examples() -> list[Example]:
    """Seven sequences, of which four share twenty tokens and two of those a few more."""
    rng = torch.Generator().manual_seed(1)
    stem, found = torch.randint(3, 400, (26,), generator=rng).tolist(), []
    for i, length in enumerate(LENGTHS):
        shared = stem[: 26 if i < 2 else 20] if length > 20 else []
        ids = shared + torch.randint(3, 400, (length - len(shared),), generator=rng).tolist()
        found.append(Example(ids, [-100] * (length // 2) + ids[length // 2 :]))
    return found


def tiny(model_type: str, attention: str) -> Any:
    config = copy.deepcopy(TINY[model_type])  # a model changes the config that it is given
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("model_type", "attention", "arrangement"), ARRANGED)
def test_every_arrangement_has_the_loss_and_gradients_of_single_rows(
    model_type: str, attention: str, arrangement: Arrangement
) -> None:
    rows = [[examples()[i] for i in row] for row in pack(LENGTHS, 44)]
    assert max(map(len, rows)) > 1
    plain = collate([[example] for row in rows for example in row], 0, Arrangement.PADDED)
    other = collate(rows, 0, arrangement)
    if arrangement is Arrangement.TREE:
        assert other["input_ids"].numel() == sum(LENGTHS) - len(LENGTHS) - 60
    models = [tiny(model_type, "eager" if name == FAST else name) for name in ("eager", attention)]
    if attention == FAST:
        assert speed_up(models[1].eval(), "sdpa", max(LENGTHS))
    losses, gradients = [], []
    for model, batch in zip(models, (plain, other), strict=True):
        loss = SupervisedFineTuning()(model.train(), batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "attention"), ATTENTION)
def test_loss_equals_the_models_own_with_its_mask(model_type: str, attention: str) -> None:
    model, found = tiny(model_type, attention), examples()
    ids, labels = (torch.zeros(len(found), max(LENGTHS), dtype=torch.long) for _ in range(2))
    mask = torch.zeros_like(ids)
    labels[:] = -100
    for row, example in enumerate(found):
        mask[row, : len(example)] = 1
        ids[row, : len(example)] = torch.tensor(example.input_ids)
        labels[row, : len(example)] = torch.tensor(example.labels)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    batch = collate([[example] for example in found], 0, Arrangement.PADDED)
    assert SupervisedFineTuning()(model, batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_packed_training_equals_unpacked_training(
    make_spec: Any, run: Run, read_metrics: Any, tmp_path: Path
) -> None:
    losses = []
    for packed in (False, True):
        spec = make_spec(
            training={"n_epochs": 2},
            data={"packed": packed, "batch_size": 10},
            work_dir=tmp_path / str(packed),
        )
        run(spec)
        losses.append(read_metrics(spec.work_dir, "train_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulation_equals_a_larger_batch_with_shuffling(
    make_spec: Any, run: Run, read_metrics: Any, tmp_path: Path
) -> None:
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        spec = make_spec(
            training={"n_epochs": 2, "gradient_accumulation_steps": accumulation},
            data={"shuffle": True, "batch_size": batch_size},
            work_dir=tmp_path / str(batch_size),
        )
        run(spec)
        losses.append(read_metrics(spec.work_dir, "train_loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("algorithm", [LORA, LORA | {"use_dora": True}, None], ids=["lora", "dora", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activation_checkpointing_changes_nothing_but_memory(
    algorithm: dict[str, Any] | None, dtype: str, make_spec: Any, run: Run, read_metrics: Any, tmp_path: Path
) -> None:
    losses = []
    for checkpointing in (False, True):
        spec = make_spec(
            training={
                "dtype": dtype,
                "efficiency_config": {"enable_activation_checkpointing": checkpointing},
            },
            algorithm=algorithm,
            work_dir=tmp_path / str(checkpointing),
        )
        run(spec)
        losses.append(read_metrics(spec.work_dir, "train_loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_the_time_left_counts_what_lies_between_the_steps(
    make_spec: Any, run: Run, read_metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes a second, and what follows it, such as a validation, another nine."""
    now = iter(float(second) for ten in range(0, 100, 10) for second in (ten, ten + 1, ten + 1))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    spec = make_spec(training={"n_epochs": 1})
    run(spec)
    # After k of 5 steps the clock says 10 k - 9.
    expected = [(5 - k) * (10 * k - 9) / k for k in range(1, 6)]
    assert read_metrics(spec.work_dir, "seconds_left") == pytest.approx(expected)


def test_metrics_and_their_steps(make_spec: Any, run: Run, read_metrics: Any) -> None:
    spec = make_spec(training={"n_epochs": 2, "max_validation_steps": None})
    finished = run(spec)
    read = partial(read_metrics, spec.work_dir)
    assert read("epoch") == pytest.approx([k / 5 for k in range(1, 11)])
    assert read("progress") == pytest.approx([k / 10 for k in range(1, 11)])
    assert read("seconds_left")[-1] == 0
    validation, perplexity = read("validation_loss"), read("perplexity")
    assert len(validation) == 3  # before the first step, and after each epoch
    assert perplexity == pytest.approx([math.exp(loss) for loss in validation])
    assert validation[2] < validation[0]
    assert validation[0] == pytest.approx(math.log(400), rel=0.1)  # untrained: all tokens alike
    for epoch, checkpoint in enumerate(finished.checkpoints):
        metrics = checkpoint.training_metrics
        assert (checkpoint.epoch, metrics.epoch) == (epoch, epoch)
        assert (metrics.validation_loss, metrics.perplexity) == (validation[epoch + 1], perplexity[epoch + 1])
        losses = read("train_loss")[epoch * 5 : epoch * 5 + 5]
        assert min(losses) < metrics.train_loss < max(losses)
    assert finished.metrics["train_loss"] == read("train_loss")[-1]


def test_points_every_n_steps_are_means_since_the_last(
    make_spec: Any, run: Run, read_metrics: Any, tmp_path: Path
) -> None:
    every, sparse = (
        make_spec(work_dir=tmp_path / str(n), training={"max_validation_steps": 0}) for n in (1, 2)
    )
    sparse.request.logger_config["log_every_n_steps"] = 2
    run(every)
    run(sparse)
    single = read_metrics(every.work_dir, "train_loss")
    means = read_metrics(sparse.work_dir, "train_loss")
    assert len(means) == 3  # steps 2, 4, and 5: the last
    assert means[2] == single[4]
    assert min(single[:2]) < means[0] < max(single[:2])
    assert read_metrics(every.work_dir, "validation_loss") == []


def test_a_loss_that_is_no_number_ends_the_training(make_spec: Any, run: Run) -> None:
    optimizer = {"optimizer_type": "sgd", "lr": 1e30, "weight_decay": 0.0, "num_warmup_steps": 0}
    with pytest.raises(DivergenceError, match=r"the loss became (nan|inf) at optimizer step \d"):
        run(make_spec(training={"optimizer_config": optimizer, "max_validation_steps": 0}))
