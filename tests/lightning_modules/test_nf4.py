"""4-bit base weights: what they hold, what they weigh, and training through them, by both packages."""

from __future__ import annotations

import copy
import io
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_modules.adapters import add_adapters
from lightning_modules.nf4 import (
    BACKENDS,
    BLOCK,
    dequantized,
    is_quantized,
    preferred_backend,
    quantizable,
    quantize_base,
)
from post_training.errors import ModelError
from tests.lightning_modules.test_adapters import lora, randomize, tiny

both = pytest.mark.parametrize("backend", list(BACKENDS))
IDS = torch.arange(24).reshape(2, 12)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows of whole blocks, which bitsandbytes packs; others go to torchao."""


def levels() -> Tensor:
    """The 16 levels by their definition: quantiles of N(0, 1), 8 below zero, zero, 7 above, over the largest.

    QLoRA, section 3, equation 4; its offset is the mean of 1 - 1/(2·15) and 1 - 1/(2·16).
    """
    offset = 1 - (1 / 30 + 1 / 32) / 2
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))
    found = torch.cat([negative[:-1], torch.zeros(1), positive[:-1]]).sort().values
    return (found / found.max()).float()


def quantized(kind: str, backend: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = tiny(kind, **(WIDE | changes)).to(dtype)
    quantize_base(model, dtype, backend)
    return model


def plain_copy(model: Any, kind: str, dtype: torch.dtype) -> Any:
    """The same model with ordinary linear layers that hold the dequantized weights."""
    plain = tiny(kind, **WIDE).to(dtype)
    for name, module in model.named_modules():
        if is_quantized(module):
            plain.get_submodule(name).weight.data.copy_(dequantized(module))
    return plain


@both
@pytest.mark.parametrize("in_features", [128, 96, 32])
def test_weights_become_the_nearest_level_of_their_block(backend: str, in_features: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(in_features, 40)
    layer.weight.data.mul_(1 + torch.arange(40.0)[:, None])  # other blocks have other scales
    blocks = layer.weight.detach().reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    grid = levels() * scale[..., None]
    found = dequantized(BACKENDS[backend](layer, torch.float32)).reshape(-1, BLOCK)
    tolerance = 0.01 * scale.max()  # the scales have 8 bits
    assert (found[..., None] - grid).abs().amin(dim=-1).max() < tolerance
    smallest = (blocks[..., None] - grid).abs().amin(dim=-1)
    assert ((found - blocks).abs() < smallest + tolerance).all()
    assert (found - blocks).norm() < 0.12 * blocks.norm()


def test_the_levels_are_those_of_the_paper() -> None:
    expected = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    expected += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]  # appendix E, rounded
    torch.testing.assert_close(levels(), torch.tensor(expected), atol=6e-5, rtol=0)


@both
def test_only_the_projections_are_quantized(backend: str) -> None:
    model, before = quantized("qwen2", backend), tiny("qwen2", **WIDE)
    changed = {name for name, module in model.named_modules() if is_quantized(module)}
    assert changed == set(quantizable(before))
    assert {name.rpartition(".")[2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert len(changed) == 2 * 7
    kept = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, value in before.state_dict().items():
        if name.removesuffix(".weight") not in changed:  # biases, norms, embedding, head
            assert torch.equal(kept[name], value)
    kinds = {type(module).__module__.partition(".")[0] for module in filter(is_quantized, model.modules())}
    assert kinds == {"bitsandbytes" if backend == "bitsandbytes" else "lightning_modules"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mlp." in n)


@both
def test_a_weight_takes_little_more_than_4_bits(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    with caplog.at_level(logging.INFO):
        model = quantized("llama", backend, torch.bfloat16, **sizes)
    stored = total = 0
    for module in filter(is_quantized, model.modules()):
        weights = module.in_features * module.out_features
        layer = sum(value.nbytes for value in module.state_dict().values())
        # half a byte a weight, a byte a scale, 4 bytes for 256 scales; tables of levels, shapes
        assert weights / 2 <= layer <= weights / 2 + weights / 64 + 4 * weights / (64 * 256) + 1500
        stored, total = stored + layer, total + weights
    assert total == 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
    assert f"{stored / 2**20:.1f} MiB instead of {2 * total / 2**20:.1f}" in caplog.text


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_by_its_dequantized_weight(backend: str, dtype: torch.dtype) -> None:
    layer = BACKENDS[backend](nn.Linear(128, 40, dtype=dtype), dtype)
    weight = dequantized(layer)
    assert (weight.dtype, weight.shape) == (dtype, (40, 128))
    for x in (torch.randn(2, 3, 128), torch.randn(7, 128, dtype=dtype)):
        expected = linear(x.to(dtype), weight, layer.bias).to(x.dtype)
        torch.testing.assert_close(layer(x), expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)


@both
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_adapters_on_the_dequantized_weights(
    backend: str, dora: bool, dtype: torch.dtype, checkpointing: bool
) -> None:
    config = lora("q_proj", "v_proj", "output_proj", mlp=True, output=True, dora=dora)
    base = quantized("qwen2", backend, dtype)
    gradients, losses = [], []
    for model in (plain_copy(base, "qwen2", dtype), base):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)
        adapted = randomize(add_adapters(model, config, "base")).train()
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    reference, found = gradients
    assert all(gradient.norm() > 0 for gradient in reference.values())
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(found, reference)
    # the comparison can tell: on the weights before quantization they are others
    unquantized = randomize(add_adapters(tiny("qwen2", **WIDE).to(dtype), config, "base"))
    assert (unquantized(IDS, labels=IDS).loss - losses[0]).abs() > 1e-4


@both
def test_validating_leaves_the_layers_as_they_were(backend: str) -> None:
    """bitsandbytes repacks weights in an evaluation's forward pass, on processors with AVX512-BF16."""
    model = quantized("llama", backend)
    adapted = randomize(add_adapters(model, lora("q_proj"), "base"))
    before = [dequantized(module) for module in filter(is_quantized, model.modules())]
    with torch.no_grad():
        trained = adapted.train()(IDS).logits
        validated = adapted.eval()(IDS).logits
    assert torch.equal(trained, validated)
    after = [dequantized(module) for module in filter(is_quantized, model.modules())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@both
def test_a_resume_state_of_trained_weights_alone(backend: str) -> None:
    source, target = (
        add_adapters(quantized("llama", backend), lora("q_proj", dora=True), "base") for _ in range(2)
    )
    randomize(source)
    trained = {name for name, p in source.named_parameters() if p.requires_grad}
    file = io.BytesIO()
    torch.save({name: value for name, value in source.state_dict().items() if name in trained}, file)
    file.seek(0)
    assert not torch.equal(source(IDS).logits, target(IDS).logits)
    answer = target.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert not answer.unexpected_keys
    assert torch.equal(source(IDS).logits, target(IDS).logits)
    target.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(source(IDS).logits, target(IDS).logits)


@both
def test_a_copy_computes_the_same(backend: str) -> None:
    model = quantized("llama", backend)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


@both
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quantized_on_the_cpu_it_runs_on_a_gpu(backend: str) -> None:
    model = quantized("llama", backend)
    expected = model(IDS).logits
    model.to("cuda")
    torch.testing.assert_close(model(IDS.cuda()).logits.cpu(), expected, atol=1e-3, rtol=1e-3)
    there = tiny("llama", **WIDE).to("cuda")
    quantize_base(there, torch.float32, backend)
    assert all(p.device.type == "cuda" for p in there.parameters())
    torch.testing.assert_close(there(IDS.cuda()).logits.cpu(), expected, atol=1e-3, rtol=1e-3)


@both
def test_gpt2_is_refused(backend: str) -> None:
    with pytest.raises(ModelError, match=r"quantize_base is refused: this gpt2 model has no nn\.Linear"):
        quantize_base(tiny("gpt2"), torch.float32, backend)
    with torch.device("meta"):
        gpt2, llama = tiny("gpt2"), tiny("llama")
    with pytest.raises(ModelError, match="quantize_base is refused"):
        quantizable(gpt2)
    assert len(quantizable(llama)) == 2 * 7


@both
def test_weights_that_are_no_whole_blocks_are_refused(backend: str) -> None:
    with pytest.raises(
        ModelError, match=r"quantize_base is refused: .* blocks of 64 .* 7 x 10 leaves 6 over"
    ):
        BACKENDS[backend](nn.Linear(10, 7), torch.float32)


def test_torchao_where_bitsandbytes_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert preferred_backend() == "bitsandbytes"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert preferred_backend() == "torchao"
    assert "goes through torchao, which is slower" in caplog.text
