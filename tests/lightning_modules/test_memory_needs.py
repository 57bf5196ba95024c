"""What a training needs of memory, by hand for the tiny Llama, and as autograd really keeps it.

The tiny Llama: 400 tokens, h = 32, i = 64, two layers, four heads of 8, two of keys. Embedding and head have
12,800 weights each, a layer 9,216 in its projections and 64 in its norms, the last norm 32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.adapters import add_adapters
from lightning_modules.base_model import meta_model
from lightning_modules.engine.tiles import Heads, Layout
from lightning_modules.job import prepare_job
from lightning_modules.memory_needs import (
    NF4,
    activations,
    adapter_parameters,
    certain,
    kept_of_layer,
    scores_on_cpu,
)
from lightning_modules.record import open_record
from lightning_modules.setting import Setting
from lightning_modules.workload import Largest
from tests.lightning_modules.bases import lora
from tests.lightning_modules.tiny import LORA, TINY
from tests.tiny_model import write_tiny_model

PARAMETERS = 2 * 12_800 + 2 * (9_216 + 64) + 32
LORA_PARAMETERS = 2 * 4 * ((32 + 32) + (32 + 16))  # two layers, rank 4, on q and v
ALL = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
SGD = {"optimizer_type": "sgd", "lr": 0.1, "weight_decay": 0.0, "num_warmup_steps": 0}
CHECKPOINTING = {"efficiency_config": {"enable_activation_checkpointing": True}}
QAT = {"type": "QAT", "quantizer_name": "int4_weight_only", "group_size": 32}
QAT_8BIT = QAT | {"quantizer_name": "int8_dynamic_activation_int4_weight"}


@pytest.fixture
def outline() -> Any:
    return meta_model(TINY["llama"])


@pytest.mark.parametrize(
    ("changes", "weights", "trained", "moments"),
    [
        ({"algorithm": None}, 4 * PARAMETERS, PARAMETERS, 2),
        ({"algorithm": None, "training": {"optimizer_config": None}}, 4 * PARAMETERS, PARAMETERS, 2),
        ({"algorithm": None, "training": {"optimizer_config": SGD}}, 4 * PARAMETERS, PARAMETERS, 0),
        ({}, 4 * (PARAMETERS + LORA_PARAMETERS), LORA_PARAMETERS, 2),
        (
            {"algorithm": LORA | {"use_dora": True}},
            4 * (PARAMETERS + LORA_PARAMETERS + 2 * (32 + 16)),
            LORA_PARAMETERS + 2 * (32 + 16),
            2,
        ),
        (
            {"algorithm": LORA | {"quantize_base": True}},
            4 * (PARAMETERS - 2 * 9_216 + LORA_PARAMETERS) + round(2 * 9_216 * NF4),
            LORA_PARAMETERS,
            2,
        ),
        (
            {"algorithm": QAT, "runtime": {"adapter": LORA}},
            4 * (PARAMETERS + LORA_PARAMETERS),
            LORA_PARAMETERS,
            2,
        ),
    ],
)
def test_what_is_certain(
    changes: dict[str, Any], weights: int, trained: int, moments: int, make_spec: Any, outline: Any
) -> None:
    needs = certain(Setting.of(make_spec(**changes)), outline)
    assert needs.weights == pytest.approx(weights, abs=1)
    assert (needs.gradients, needs.optimizer) == (4 * trained, 4 * trained * moments)
    assert needs.loading == 4 * PARAMETERS
    assert needs.training == needs.weights + needs.gradients + needs.optimizer


def test_a_frozen_base_is_as_wide_as_the_job(make_spec: Any, outline: Any) -> None:
    setting = Setting.of(make_spec())
    object.__setattr__(setting, "dtype", "bf16")  # whether the processor has it or not
    assert certain(setting, outline).loading == 2 * PARAMETERS
    assert certain(setting, outline).weights == 2 * PARAMETERS + 4 * LORA_PARAMETERS


def test_nf4_takes_four_bits_and_an_eighth() -> None:
    bits = 8 * NF4
    assert bits == pytest.approx(4.127, abs=5e-4)  # QLoRA, section 3: 0.127 bits for the scales


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("changes", [{}, ALL, ALL | {"use_dora": True}, {"apply_lora_to_output": True}])
def test_adapters_have_as_many_parameters_as_are_foreseen(
    kind: str, changes: dict[str, Any], make_spec: Any
) -> None:
    setting = Setting.of(make_spec(algorithm=LORA | changes))
    foreseen = adapter_parameters(setting, meta_model(TINY[kind]))
    adapted = add_adapters(meta_model(TINY[kind]), lora(**changes), "base")
    assert foreseen == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


QV = 2 * 32 + 32 + 2 * 16 + 2 * 64
"""Two norms' results, queries, keys and values, and the two inputs of the gate."""

OF_LAYER = [
    ({}, 4 * QV),
    ({"algorithm": LORA | ALL}, 4 * (QV + 32 + 64)),
    ({"algorithm": None}, 4 * (QV + 2 * 32 + 32 + 64)),
    ({"algorithm": QAT_8BIT}, 4 * (QV + 2 * 32 + 32 + 64) + 4 * (5 * 32 + 32 + 64 + 3 * 32)),
    ({"algorithm": LORA | {"use_dora": True}}, 4 * (QV + 3 * (32 + 16))),
    ({"algorithm": QAT, "runtime": {"adapter": LORA}}, 4 * QV),
]


@pytest.mark.parametrize(("changes", "expected"), OF_LAYER)
def test_what_a_layer_keeps_of_a_token(
    changes: dict[str, Any], expected: int, make_spec: Any, outline: Any
) -> None:
    assert kept_of_layer(Setting.of(make_spec(**changes)), outline) == expected


@pytest.mark.parametrize(
    ("changes", "padded", "expected"),
    [
        ({}, False, 10 * (2 * 4 * QV + 2 * 4 * 32) + 2 * 10 * 400 * 4),
        ({"training": CHECKPOINTING}, False, 10 * (2 * 4 * 32 + 4 * QV + 2 * 4 * 32) + 2 * 10 * 400 * 4),
        (
            {"runtime": {"attn_implementation": "eager"}},
            True,
            10 * (2 * 4 * (QV + 2 * 4 * 5) + 2 * 4 * 32) + 2 * 10 * 400 * 4,  # two rows of five, four heads
        ),
        (
            {"algorithm": None},
            False,
            10 * (2 * 4 * (QV + 160) + 2 * 4 * 32) + 2 * 10 * 400 * 4 + 4 * 12_800,  # the head's gradient
        ),
        (
            {"algorithm": QAT},
            False,
            10 * (2 * 4 * (QV + 160) + 2 * 4 * 32) + 2 * 10 * 400 * 4 + 4 * 12_800 + 2 * 4 * 2 * 9_216,
        ),
    ],
)
def test_activations(
    changes: dict[str, Any], padded: bool, expected: int, make_spec: Any, outline: Any
) -> None:
    setting = Setting.of(make_spec(**changes))
    assert activations(setting, outline, Largest(10, 5), padded=padded) == expected


def test_a_cpu_s_attention_has_masks_and_a_group_s_scores(make_spec: Any, outline: Any) -> None:
    """Tiles of at most 128 queries, which see 128, 256 and 300 keys: too unlike to be computed together."""
    sizes = [128 * 128, 128 * 256, 44 * 300]
    expected = 4 * 4 * (sum(sizes) + 4 * 128 * 256)  # heads, fp32
    assert scores_on_cpu(Setting.of(make_spec()), outline, Largest(300, 300)) == expected
    masks = Layout.of_rows(1, 300).plan(None, Heads(4, 2), torch.float32).masks
    assert sum(mask.numel() for mask in masks) == 4 * sum(sizes)
    pairs = Setting.of(make_spec(preference={}))
    assert scores_on_cpu(pairs, outline, Largest(256, 256)) == 4 * 4 * 5 * (2 * 128 * 128)


def test_logits_exist_for_a_chunk_only(make_spec: Any, outline: Any) -> None:
    setting = Setting.of(make_spec())
    chunk = 2**24 // 400
    more = activations(setting, outline, Largest(chunk + 1000, 5), padded=False)
    assert more - activations(setting, outline, Largest(chunk, 5), padded=False) == 1000 * (8 * QV + 8 * 32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm": LORA | ALL},
        {"algorithm": None},
        {"algorithm": QAT},
        {"algorithm": QAT_8BIT},
        {"algorithm": QAT, "runtime": {"adapter": LORA}},
        {"algorithm": LORA | {"quantize_base": True}},
        {"algorithm": LORA | ALL | {"use_dora": True}},
    ],
)
def test_autograd_keeps_what_is_foreseen(changes: dict[str, Any], make_spec: Any, tmp_path: Any) -> None:
    """Of a wider model, in which the adapters' own activations are small."""
    model = write_tiny_model(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    spec = make_spec(model=str(model), data={"batch_size": 8}, **changes)
    job = prepare_job(spec, open_record(spec))
    (batch,) = next(iter(job.data.train_loader))
    weights = {p.untyped_storage().data_ptr() for p in job.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcome = job.module.objective(job.module.model, batch)
    outline = meta_model(job.module.language_model.config)
    tokens = batch["input_ids"].numel()
    found = activations(job.setting, outline, Largest(tokens, 0), padded=False)
    rest = 2 * tokens * outline.config.vocab_size * 4  # logits are gone by now
    print(sum(kept.values()), found - rest)
    assert sum(kept.values()) == pytest.approx(found - rest, rel=0.15)
    del outcome
