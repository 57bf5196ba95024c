"""What quantization-aware training computes, trains and saves, against formulas written out here."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torchao.quantization.qat.linear import FakeQuantizedLinear
from transformers import AutoModelForCausalLM, GgufConfig

from lightning_modules.data.layout import Segment
from lightning_modules.engine.prepare import speed_up
from lightning_modules.engine.tiles import Layout
from lightning_modules.quantization import QUANTIZERS, check_group_size, prepare, quantized_copy
from post_training.errors import ModelError
from post_training.schemas.algorithms import LoraFinetuningConfig, QATFinetuningConfig, Quantizer
from tests.lightning_modules.tiny import TINY

Adapter = LoraFinetuningConfig | None
GROUP, RANK, ALPHA = 16, 4, 8
WEIGHTS, ACTIVATIONS = Quantizer.int4_weight_only, Quantizer.int8_dynamic_activation_int4_weight
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "rank": RANK, "alpha": ALPHA}
ADAPTER, ADAPTER_ON_HEAD = (
    LoraFinetuningConfig.model_validate(LORA | {"apply_lora_to_output": output}) for output in (False, True)
)
IDS = torch.randint(3, 400, (3, 12), generator=torch.Generator().manual_seed(1))
FP32, MIXED = Precision(), MixedPrecision("bf16-mixed", "cpu")
both_quantizers = pytest.mark.parametrize("quantizer", [WEIGHTS, ACTIVATIONS], ids=["4w", "8da4w"])
both_trainings = pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["all", "adapter"])


def tiny(kind: str = "llama", **changes: Any) -> Any:
    config = copy.deepcopy(TINY[kind])  # a model changes the config that it is given
    config.update(changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def qat(quantizer: Quantizer = ACTIVATIONS, group_size: int = GROUP) -> QATFinetuningConfig:
    return QATFinetuningConfig(quantizer_name=quantizer, group_size=group_size)


def prepared(quantizer: Quantizer = ACTIVATIONS, adapter: Adapter = None, *kind: str, **changes: Any) -> Any:
    model = tiny(*kind, **changes)
    prepare(model, qat(quantizer), adapter)
    return model.train()


def loss(model: Any, precision: Precision = FP32) -> Tensor:
    with precision.train_step_context():
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def train(model: Any, steps: int, precision: Precision = FP32) -> list[float]:
    """Train on the same rows; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        losses.append(loss(model, precision))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [value.item() for value in losses]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return copy.deepcopy(model).eval()(input_ids=IDS, use_cache=False).logits


def four_bit(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scales and their product: a group's largest magnitude lies halfway from level 7 to 8."""
    groups = weight.detach().unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(2, keepdim=True) / 7.5
    levels = (groups * (1 / scales)).round().clamp(-8, 7)
    return levels.flatten(1), scales.squeeze(2), (levels * scales).flatten(1)


def eight_bit(x: Tensor) -> Tensor:
    """A token's activations on 256 levels between its extremes, zero among them."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = -128 - (low / scale).round()
    return (((x * (1 / scale)).round() + zero).clamp(-128, 127) - zero) * scale


def test_every_quantizer_is_available() -> None:
    assert set(QUANTIZERS) == set(Quantizer)


def test_group_sizes_are_checked_without_weights() -> None:
    with torch.device("meta"):
        model = tiny(hidden_size=48, intermediate_size=80)  # and 32 from the attention to o_proj
    check_group_size(model, qat(group_size=16))
    for size, name, features in ((32, "q_proj", 48), (48, "o_proj", 32), (1, "q_proj", 48)):
        what = rf"^group_size {size} does not fit model\.layers\.0\.self_attn\.{name}, .* is {features};"
        with pytest.raises(ModelError, match=what + r" group sizes that fit every layer: 2, 4, 8, 16$"):
            check_group_size(model, qat(group_size=size))
    with pytest.raises(ModelError, match="group_size 32 does not fit"):
        prepare(model, qat(group_size=32))
    with pytest.raises(ModelError, match=r"this gpt2 model has no nn\.Linear layer besides its output head"):
        check_group_size(tiny("gpt2"), qat())


@both_quantizers
@pytest.mark.parametrize("kind", ["llama", "qwen2"], ids=["no bias", "bias"])
def test_a_prepared_layer_computes_with_quantized_values(quantizer: Quantizer, kind: str) -> None:
    plain, model = tiny(kind), prepared(quantizer, None, kind)
    x = torch.randn(3, 5, 32)
    seen = x if quantizer is WEIGHTS else eight_bit(x)
    for name in ("q_proj", "o_proj"):
        linear, layer = (m.get_submodule(f"model.layers.1.self_attn.{name}") for m in (plain, model))
        weight = four_bit(linear.weight)[2]
        torch.testing.assert_close(layer(x), functional.linear(seen, weight, linear.bias))
        only_weight = functional.linear(x, weight, linear.bias)
        assert torch.allclose(layer(x), only_weight, rtol=0, atol=1e-5) is (quantizer is WEIGHTS)
        assert not torch.allclose(layer(x), linear(x), rtol=0, atol=1e-2)
    assert torch.equal(model.lm_head(x), plain.lm_head(x))


@pytest.mark.parametrize("tied", [True, False])
def test_preparing_keeps_parameters_and_their_names(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    before = dict(model.requires_grad_(False).named_parameters())
    prepare(model, qat())
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] and after[name].requires_grad for name in before)
    assert sum(isinstance(module, FakeQuantizedLinear) for module in model.modules()) == 2 * 7
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@both_quantizers
@both_trainings
@pytest.mark.parametrize("precision", [FP32, MIXED], ids=["fp32", "mixed"])
def test_the_loss_falls(quantizer: Quantizer, adapter: Adapter, precision: Precision) -> None:
    model = prepared(quantizer, adapter)
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = train(model, 6, precision)
    assert losses[-1] < losses[0] - (0.02 if adapter else 0.5)
    for name, p in model.named_parameters():
        assert p.requires_grad is (adapter is None or ".lora_" in name)
        assert torch.equal(p, before[name]) is not p.requires_grad


@both_quantizers
@both_trainings
def test_recomputed_activations_give_the_same_gradients(quantizer: Quantizer, adapter: Adapter) -> None:
    kept, recomputed = prepared(quantizer, adapter), prepared(quantizer, adapter)
    recomputed.activation_checkpointing_enable({"use_reentrant": False})
    for model in (kept, recomputed):
        loss(model, MIXED).backward()
    pairs = [(a.grad, b.grad) for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs if a is not None)
    assert sum(a is not None for a, _ in pairs) == (20 if adapter else 21)


@both_quantizers
def test_packed_rows_have_the_logits_of_single_rows(quantizer: Quantizer) -> None:
    model, lengths = prepared(quantizer), [7, 12, 9, 8]
    assert speed_up(model.eval(), "sdpa", 36)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    row = {"input_ids": IDS.reshape(1, 36), "position_ids": positions, "use_cache": False}
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    layout = Layout([Segment((end - length, end)) for end, length in zip(ends, lengths, strict=True)])
    packed = model(**row, layout=layout).logits[0]
    for ids, together in zip(IDS.flatten().split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(model(input_ids=ids[None]).logits[0], together, rtol=0, atol=1e-3)
    assert not torch.allclose(model(**row).logits[0], packed, rtol=0, atol=1e-2)


@both_trainings
def test_a_newly_prepared_model_resumes_from_trained_weights(adapter: Adapter) -> None:
    model, other = prepared(ACTIVATIONS, adapter), prepared(ACTIVATIONS, adapter)
    train(model, 2)
    other.load_state_dict({name: p for name, p in model.named_parameters() if p.requires_grad}, strict=False)
    assert torch.equal(logits(other), logits(model))


CASES: dict[str, tuple[Quantizer, Adapter, str, bool]] = {
    "weights": (WEIGHTS, None, "llama", False),
    "weights-adapter": (WEIGHTS, ADAPTER, "llama", True),
    "activations": (ACTIVATIONS, None, "llama", False),
    "activations-tied": (ACTIVATIONS, None, "llama", True),
    "activations-adapter": (ACTIVATIONS, ADAPTER_ON_HEAD, "llama", False),
    "bias": (ACTIVATIONS, ADAPTER, "qwen2", False),
    "fused": (ACTIVATIONS, None, "phi3", False),
    "soft-capped": (ACTIVATIONS, None, "gemma2", False),
}
LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = load_file("ids")["ids"]
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logits = model(input_ids=ids, use_cache=False).logits.detach()
    answer = model.generate(ids[:1], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    save_file({"logits": logits, "tied": torch.tensor(tied), "answer": answer}, name + ".loaded")
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with each case's export and what a fresh process made of it; and the trained models."""
    folder, models = tmp_path_factory.mktemp("exports"), {}
    for name, (quantizer, adapter, kind, tied) in CASES.items():
        models[name] = prepared(quantizer, adapter, kind, tie_word_embeddings=tied)
        train(models[name], 2)
        quantized_copy(models[name], qat(quantizer)).save_pretrained(folder / name)
    save_file({"ids": IDS}, folder / "ids")
    subprocess.run([sys.executable, "-c", LOAD, *CASES], cwd=folder, check=True)
    return folder, models


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_what_was_trained(exports: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, models = exports
    loaded = load_file(folder / f"{name}.loaded")
    torch.testing.assert_close(loaded["logits"], logits(models[name]), rtol=0, atol=1e-5)
    assert bool(loaded["tied"]) is CASES[name][3]
    assert loaded["answer"].shape == (1, 12 + 4)


@both_quantizers
@both_trainings
def test_saved_weights_are_the_quantized_trained_ones(
    quantizer: Quantizer, adapter: Adapter, tmp_path: Path
) -> None:
    model, untrained = prepared(quantizer, adapter), tiny()
    train(model, 4)
    quantized_copy(model, qat(quantizer)).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        layer, before = (m.get_submodule(f"model.layers.1.{name}") for m in (model, untrained))
        weight, adapted = layer.weight, adapter is not None and "o_proj" not in name
        if adapted:
            a, b = (p for key, p in layer.named_parameters() if ".lora_" in key)
            weight = weight + ALPHA / RANK * b @ a
            with MIXED.train_step_context():
                torch.testing.assert_close(layer.weight_fake_quantizer[0](layer.weight), weight)
        expected, scales, _ = four_bit(weight)
        values, scale = (saved[f"model.layers.1.{name}._weight_{part}"] for part in ("qdata", "scale"))
        torch.testing.assert_close(scale, scales)
        assert (values != expected).float().mean() < 0.01  # B·A rounds differently here
        assert adapted or torch.equal(values, expected.to(torch.int8))
        assert values.unique().tolist() == list(range(-8, 8))
        moved = (values != four_bit(before.weight)[0]).float().mean()
        assert (moved > 0.02) == (adapter is None or adapted)
    assert {saved[f"model.{name}.weight"].dtype for name in ("embed_tokens", "norm")} == {torch.float32}


@both_quantizers
def test_converting_what_was_trained_is_quantizing_its_weights(quantizer: Quantizer) -> None:
    model, plain = prepared(quantizer), tiny()
    train(model, 2)
    plain.load_state_dict(model.state_dict())
    converted, quantized = (quantized_copy(m, qat(quantizer)) for m in (model, plain))
    for (name, a), (_, b) in zip(converted.named_parameters(), quantized.named_parameters(), strict=True):
        parts = getattr(a, "tensor_data_names", ())
        assert len(parts) == (3 if "_proj" in name else 0)
        assert all(torch.equal(getattr(a, part), getattr(b, part)) for part in parts)
        assert parts or torch.equal(a, b)


@both_trainings
def test_training_goes_on_after_an_export(adapter: Adapter) -> None:
    model, undisturbed = (prepared(ACTIVATIONS, adapter, tie_word_embeddings=True) for _ in range(2))
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.quantization_config = GgufConfig(dequantize=True)  # of the file that it came from
    train(model, 2)
    train(undisturbed, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    exported = quantized_copy(model, qat())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trained
    assert (model.training, exported.training) == (True, False)
    assert isinstance(model.config.quantization_config, GgufConfig)
    told = exported.config.quantization_config
    assert (told.quant_method, told.modules_to_not_convert) == ("torchao", ["lm_head"])
    assert not any(p.requires_grad for p in exported.parameters())
    assert exported.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert train(model, 2) == train(undisturbed, 2)


def test_adapters_that_cannot_be_trained_are_refused() -> None:
    for field in ("use_dora", "quantize_base"):
        with pytest.raises(ModelError, match=rf"^runtime\.adapter\.{field} is refused"):
            prepare(tiny(), qat(), ADAPTER.model_copy(update={field: True}))
    with pytest.raises(ModelError, match="apply_lora_to_output is refused"):
        prepare(tiny(tie_word_embeddings=True), qat(), ADAPTER_ON_HEAD)
