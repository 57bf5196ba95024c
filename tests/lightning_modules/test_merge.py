"""A merged model computes what the adapted one does, and the adapted one is left alone."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_modules.adapters import add_adapters
from lightning_modules.engine.attention import TREE
from lightning_modules.engine.prepare import speed_up
from lightning_modules.merge import export_merged, merged_state_dict
from lightning_modules.models import load_model
from lightning_modules.nf4 import BACKENDS, dequantized, quantize_base
from post_training.errors import DivergenceError
from tests.lightning_modules.bases import write_gguf
from tests.lightning_modules.test_adapters import CONFIGS, lora, randomize, tiny

IDS = torch.arange(24).reshape(2, 12)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TEXT = [kind for kind in CONFIGS if kind != "gemma3"]


def adapted(
    kind: str,
    *,
    backend: str | None = None,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
    mlp: bool = True,
    output: bool = False,
    **changes: Any,
) -> Any:
    """A model whose adapters were moved, in training mode; o_proj stays without one."""
    model = tiny(kind, **changes).to(dtype)
    if backend is not None:
        quantize_base(model, dtype, backend)
    config = lora("q_proj", "v_proj", mlp=mlp, output=output, dora=dora, rank=3)
    return randomize(add_adapters(model, config, "base")).train()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What a model without dropout computes."""
    answer: Tensor = model(IDS).logits
    return answer


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*model.state_dict().items(), *model.named_buffers()]}


def check_exported(model: Any, folder: Path) -> Any:
    """Export, load with plain transformers, compare; return what was loaded."""
    expected = logits(model)
    before, modules = snapshot(model), {name: type(module) for name, module in model.named_modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = model.config.to_dict()
    export_merged(model, folder)
    assert model.config.to_dict() == config
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    still = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(a is b for a, b in zip(trained, still, strict=True))  # the optimizer holds them
    assert model.training
    assert torch.equal(logits(model), expected)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(logits(loaded), expected, atol=3e-6, rtol=0)
    with model.disable_adapter():
        assert (logits(model) - expected).abs().max() > 0.01  # what was merged matters
    return loaded


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", TEXT)
def test_every_architecture(kind: str, dora: bool, tied: bool, tmp_path: Path) -> None:
    model = adapted(kind, dora=dora, output=not tied, tie_word_embeddings=tied)
    loaded = check_exported(model, tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", [kind for kind in TEXT if kind != "gpt2"])
def test_a_quantized_base(
    kind: str, dora: bool, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(kind, backend=backend, dora=dora, output=True, **WIDE)
    loaded = check_exported(model, tmp_path)
    assert "the merged model has its full size again" in caplog.text
    untouched = "model.layers.1.self_attn.o_proj"
    of_model = dequantized(model.get_submodule(f"base_model.model.{untouched}"))
    assert torch.equal(loaded.get_submodule(untouched).weight, of_model)
    assert not torch.equal(of_model, tiny(kind, **WIDE).get_submodule(untouched).weight)
    assert loaded.state_dict().keys() == tiny(kind, **WIDE).state_dict().keys()
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_without_a_quantized_base_there_is_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    merged_state_dict(adapted("llama"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("kind", "backend"), [("gpt2", None), ("qwen2", None), *(("qwen2", name) for name in BACKENDS)]
)
def test_the_update_is_added_and_rounded_once(kind: str, backend: str | None) -> None:
    """In bf16, by the formula; rank 3 and alpha 4 make the scale 4 / 3."""
    model = adapted(kind, backend=backend, dtype=torch.bfloat16, **WIDE)
    path = {"gpt2": "transformer.h.0.attn.c_attn", "qwen2": "model.layers.0.self_attn.v_proj"}[kind]
    layer = model.get_submodule(f"base_model.model.{path}")
    base = layer.base_layer.weight if backend is None else dequantized(layer.base_layer)
    update = 4 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = (base.float() + (update.T if kind == "gpt2" else update)).bfloat16()
    state = merged_state_dict(model)
    torch.testing.assert_close(state[f"{path}.weight"], expected, atol=0, rtol=2**-8)  # one bf16 step
    assert (state[f"{path}.weight"] != expected).float().mean() < 0.01
    assert torch.equal(state[f"{path}.bias"], layer.base_layer.bias)


def test_only_what_is_merged_is_copied() -> None:
    model = adapted("llama", mlp=False, tie_word_embeddings=True)
    held = {tensor.data_ptr() for tensor in model.state_dict().values()}
    state = merged_state_dict(model)
    new = {name for name, tensor in state.items() if tensor.data_ptr() not in held}
    layers = [f"model.layers.{i}.self_attn.{name}.weight" for i in range(2) for name in ("q_proj", "v_proj")]
    assert new == set(layers)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert not any(tensor.requires_grad for tensor in state.values())


def test_training_goes_on_as_if_nothing_had_been_exported(tmp_path: Path) -> None:
    undisturbed = adapted("qwen2", dora=True)
    exported = copy.deepcopy(undisturbed)
    for model in (undisturbed, exported):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if model is exported and step == 1:
                check_exported(model, tmp_path)
    assert torch.equal(logits(exported), logits(undisturbed))


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_are_not_finite_are_refused(dora: bool, tmp_path: Path) -> None:
    model = adapted("llama", dora=dora)
    path = "model.layers.1.self_attn.v_proj"
    model.get_submodule(f"base_model.model.{path}").lora_B["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(DivergenceError, match=rf"the merged weight of {path} is not finite"):
        export_merged(model, tmp_path)


def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    model = adapted("llama", backend="bitsandbytes", dora=True, **WIDE)
    export_merged(model, tmp_path)
    code = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "logits = model(torch.arange(24).reshape(2, 12)).logits\n"
        "print(json.dumps([type(model).__name__, logits.tolist()]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    name, values = json.loads(answer.stdout)
    assert name == "LlamaForCausalLM"
    torch.testing.assert_close(torch.tensor(values), logits(model), atol=3e-6, rtol=0)


def test_settings_of_training_stay_behind(tmp_path: Path) -> None:
    """bf16 stays; the attention of packed rows and an unusual generation config do no harm."""
    model = adapted("llama", dtype=torch.bfloat16, **WIDE)
    base = model.get_base_model()
    assert speed_up(base.eval(), "sdpa", 12)
    base.generation_config.temperature = 0.5  # without do_sample: save_pretrained would refuse it
    export_merged(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert TREE not in json.dumps(config)
    assert base.config._attn_implementation == TREE
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.generation_config.temperature == 0.5


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_base_from_gguf(backend: str | None, tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(tiny("llama", **WIDE), source)
    base = load_model(str(source), dtype=torch.float32)
    if backend is not None:
        quantize_base(base, torch.float32, backend)
    model = randomize(add_adapters(base, lora("q_proj", mlp=True, output=True), "base")).train()
    check_exported(model, tmp_path / "out")
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {"config.json", "generation_config.json", "model.safetensors"}
    assert not any(word in written["config.json"].read_text() for word in ("quantization", "gguf"))
