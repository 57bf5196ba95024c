"""Proofs of fields that take more than a value and what is read of its trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from post_training.errors import DataError, HardwareError, ModelError
from post_training.schemas.rules import unsupported
from tests.lightning_modules.fields.bench import Bench, Trial, fails, shows
from tests.lightning_modules.fields.readers import trained_rows, types, weight_files

LR, DECAY = 0.01, 0.1
"""Of the bench's request."""

WARMUP = "training_config__optimizer_config__num_warmup_steps"
STEADY = {WARMUP: 0, "runtime__scheduler": "constant"}
ONE_STEP = {**STEADY, "training_config__max_steps_per_epoch": 1}
DATA = "training_config__data_config__dataset_id"
ALL = {"supervised_fine_tune": {"algorithm_config": None}, "preference_optimize": {"runtime__adapter": None}}
"""What trains every weight."""


def shuffles(bench: Bench) -> None:
    """Each epoch has an order of its own, the same in each trial."""
    trials = [bench.trial(value, training_config__n_epochs=2) for value in (False, True, True)]
    plain, order, again = (flat(trained_rows(trial)) for trial in trials)
    assert plain == [*range(10), *range(10)]
    assert order == again
    assert sorted(order[:10]) == sorted(order[10:]) == plain[:10]
    assert order[:10] != order[10:]
    assert plain[:10] not in (order[:10], order[10:])


def flat(nested: list[list[list[int]]]) -> list[int]:
    return [number for step in nested for batch in step for number in batch]


def formats(bench: Bench) -> None:
    """What is learned of a row that has something for either format."""
    says = [json.dumps({"role": "assistant", "content": text}) for text in ("yes", "no")]
    row = {"prompt": '{"role": "user", "content": "Well?"}', "chosen": says[0], "rejected": says[1]}
    learned = {"instruct": says, "dialog": ["yes", "no"]}
    if not bench.pairs:
        asks = [json.dumps({"role": "user", "content": text}) for text in ("1", "2")]
        turns = ", ".join((asks[0], says[0], asks[1], says[1]))
        row = {"question": "Well?", "answer": "so", "dialog": f"[{turns}]"}
        learned = {"instruct": ["so"], "dialog": ["yes<|im_end|>no"]}
    for value, texts in learned.items():
        trial = bench.trial(value, **{DATA: bench.file([row])})
        ((batch,),) = trial.watch.steps
        expected = "".join(f"{text}<|im_end|>" for text in texts)
        assert trial.tokenizer.decode(batch["targets"]) == expected


def packs(bench: Bench) -> None:
    """Two of four equal rows share a packed batch, and the loss stays theirs."""
    changes: dict[str, Any] = {DATA: bench.file([bench.rows[1]] * 4)}
    changes["training_config__data_config__batch_size"] = 1
    item = bench.trial(False, **changes).job.data.train_loader.shards[0][0]
    lengths = [len(sequence) for sequence in item.sequences]
    changes["runtime__max_seq_length"] = 2 * sum(lengths) // len(lengths)
    losses = []
    for value, tokens in (
        (None, [sum(lengths)] * 4),
        (False, [sum(lengths)] * 4),
        (True, [2 * sum(lengths)] * 2),
    ):
        trial = bench.trial(value, **changes)
        assert [batch["tokens"] for (batch,) in trial.watch.steps] == tokens
        losses.append(trial.points("train_loss")[1])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def scores_input(bench: Bench) -> None:
    """Scored are the answers through their end tokens, or all tokens but the first."""
    for value in (False, None, True):
        trial = bench.trial(value)
        scored = 0
        for row in bench.rows[:2]:
            prompt = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
            texts = prompt, f"{prompt}{row['answer']}<|im_end|>", f"{prompt}{row['answer']}<|im_end|>\n"
            start, end, whole = (len(trial.tokenizer.encode(t, add_special_tokens=False)) for t in texts)
            scored += whole - 1 if value else end - start
        assert trial.watch.steps[0][0]["scored"] == scored


def cuts(bench: Bench) -> None:
    """A longer sequence loses its end."""
    (whole, short) = (
        [list(sequence.ids) for item in trial.items for sequence in item.sequences]
        for trial in (bench.trial(128), bench.trial(32))
    )
    assert 32 < max(map(len, whole)) < 128
    assert short == [ids[:32] for ids in whole]


def skips_bad_rows(bench: Bench) -> None:
    changes = {DATA: bench.file([*bench.rows[:8], "{", {"question": "alone?"}])}
    fails(DataError, "2 of 10 rows", 0.0, 0.19, **changes)(bench)
    shows(trained_rows, (0.2, [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]), **changes)(bench)


UPDATES: dict[str, tuple[type, Callable[[Tensor, Tensor], Tensor]]] = {
    "sgd": (torch.optim.SGD, lambda w, g: w - LR * (g + DECAY * w)),
    "adam": (torch.optim.Adam, lambda w, g: w - LR * unit(g + DECAY * w)),
    "adamw": (torch.optim.AdamW, lambda w, g: (1 - LR * DECAY) * w - LR * unit(g)),
}
"""A weight's first update: Adam's bias-corrected moments are the gradient and its square."""


def unit(gradient: Tensor) -> Tensor:
    return gradient / (gradient.abs() + 1e-8)


def updates(bench: Bench) -> None:
    for value, (kind, update) in UPDATES.items():
        trial = bench.trial(value, **ONE_STEP)
        assert type(trial.watch.optimizer) is kind
        for name, (weight, gradient) in trial.watch.before.items():
            torch.testing.assert_close(trial.weights[name], update(weight, gradient), rtol=1e-4, atol=1e-6)


def decays(bench: Bench) -> None:
    """AdamW takes lr · decay of each matrix away, and nothing of a norm."""
    plain, decayed = (bench.trial(value, **ONE_STEP, **ALL[bench.method]) for value in (0.0, 0.5))
    before = plain.watch.before
    assert decayed.finished is not None
    assert {weight.ndim for weight, _ in before.values()} == {1, 2}
    for name, (weight, _) in before.items():
        lost = LR * 0.5 * weight if weight.ndim == 2 else torch.zeros_like(weight)
        torch.testing.assert_close(plain.weights[name] - decayed.weights[name], lost, rtol=0, atol=1e-6)


def recomputes(bench: Bench) -> None:
    """Most of what the backward pass needs is not kept, and the loss is the same."""
    trials = [bench.trial(value, **ONE_STEP) for value in (False, None, True)]
    (plain, null, recomputed) = map(kept_bytes, trials)
    assert plain == null > 2 * recomputed > 0
    losses = [trial.points("train_loss")[1] for trial in trials]
    assert losses == [losses[0]] * 3


def kept_bytes(trial: Trial) -> int:
    """What a whole training keeps for its backward passes."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert trial.finished is not None
    return sum(sizes)


def offloads(bench: Bench) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        fails(HardwareError, "enable_activation_offloading moves activations off a GPU", True)(bench)
        for value in (False, None):
            assert not bench.trial(value).job.module.offload_activations


SEVERAL = {"runtime__devices": 2, "runtime__strategy": "fsdp"}


def shards(bench: Bench) -> None:
    """Refused where nothing is divided; what it does where something is, test_sharding.py shows."""
    assert [unsupported(bench.request(value)) for value in (False, None)] == [[], []]
    assert unsupported(bench.request(True, **SEVERAL)) == []
    (problem,) = unsupported(bench.request(True))
    assert (".".join(map(str, problem["loc"])), "must be false" in problem["msg"]) == (bench.path, True)


def offloads_weights(bench: Bench) -> None:
    shards(bench)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        fails(HardwareError, "fsdp_cpu_offload moves weights off a GPU", True, **SEVERAL)(bench)


def takes_rows(bench: Bench) -> None:
    """Each step has the rows of all devices; what several processes make of them, test_several.py shows."""
    shows(
        trained_rows,
        (1, [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]], [[8, 9]]]),
        (2, [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]),
    )(bench)


def computes_in(bench: Bench) -> None:
    """A frozen base is held in the type; a trained one is fp32 and computes in it under autocast."""
    bf16, fp32 = torch.bfloat16, torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_modules.models._has_bf16", lambda device: True)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        in_bf16, in_fp32 = (bf16, {fp32}, {bf16}), (fp32, {fp32}, {fp32})
        shows(types, ("fp32", in_fp32), ("bf16", in_bf16), (None, in_bf16), **ONE_STEP)(bench)
        shows(types, ("fp32", in_fp32), ("bf16", (fp32, {fp32}, {bf16})), **ALL[bench.method])(bench)
        fails(HardwareError, "dtype fp16 needs a GPU", "fp16")(bench)


def seeds(bench: Bench) -> None:
    """The adapters' first weights, the order of the rows and dropout are drawn from the seed.

    A preference job has no dropout: it would look like a distance from the reference.
    """
    trials = [bench.trial(value, training_config__data_config__shuffle=True) for value in (7, 7, 8)]
    drawn = [torch.cat([w.flatten() for n, w in trial.weights.items() if "lora_A" in n]) for trial in trials]
    orders = [trained_rows(trial) for trial in trials]
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).all()
    assert orders[0] == orders[1] != orders[2]
    changes = {**ALL[bench.method], bench.model_field: bench.model(attention_dropout=0.2)}
    losses = [bench.trial(value, **changes).points("train_loss") for value in (7, 7, 8)]
    assert losses[0] == losses[1]
    assert (losses[1] == losses[2]) is (bench.method == "preference_optimize")


def forms(bench: Bench) -> None:
    """Unset, an export is the adapter alone, or a merged model where the job started from an adapter."""
    adapter, merged = ["adapter_model.safetensors"], ["model.safetensors"]
    shows(weight_files, (None, adapter), ("adapter", adapter), ("merged", merged))(bench)
    start = {bench.model_field: bench.trial(None).finished.checkpoints[0].path}
    shows(weight_files, (None, merged), ("merged", merged), **start)(bench)
    fails(ModelError, "runtime.export must be merged, got 'adapter'", "adapter", **start)(bench)
