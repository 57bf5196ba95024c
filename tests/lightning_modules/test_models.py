"""Where models come from, in which type, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

from lightning_modules.models import (
    FALLBACK_CHAT_TEMPLATE,
    _has_bf16,
    cap_sequence_length,
    effective_dtype,
    load_config,
    load_model,
    load_tokenizer,
)
from lightning_modules.quantization import quantized_copy
from post_training.errors import HardwareError, ModelError
from post_training.schemas.algorithms import QATFinetuningConfig, Quantizer
from tests.lightning_modules.tiny import tiny_llama


def load(source: str | Path) -> torch.nn.Module:
    return load_model(str(source), dtype=torch.float32)


def test_a_folder_with_safetensors(tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_pickled_weights_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    torch.save(load(tiny_model_dir).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds pickled weights only"):
        load(tmp_path)


def test_an_adapter_is_no_base_model(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter; name the folder of a base model"):
        load(tmp_path)


def test_an_adapter_inside_a_model_is_not_taken_along(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load(folder)


def test_a_quantized_export_is_no_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = QATFinetuningConfig(quantizer_name=Quantizer.int4_weight_only, group_size=16)
    model = load_model(str(tiny_model_dir), dtype=torch.float32)
    quantized_copy(model, config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    for call in (load_config, load):
        with pytest.raises(ModelError, match=r"is quantized \(torchao\): start from the unquantized one"):
            call(str(tmp_path))


def test_other_quantized_models_are_no_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nf4"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantized \(bitsandbytes\)"):
        load_config(str(folder))


def test_a_known_configuration_is_not_read_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = load_config(str(folder))
    (folder / "config.json").write_text("{}")
    model = load_model(str(folder), dtype=torch.float32, config=config)
    reference = load(tiny_model_dir).state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ModelError):
        load(folder)


def test_a_tokenizer_needs_no_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("")
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.chat_template, loaded.get_vocab()) == (tokenizer.chat_template, tokenizer.get_vocab())


def test_code_of_a_model_is_never_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot load the model"):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/no/such/folder", "the model /no/such/folder does not exist"),
        ("{tmp}/empty", "holds neither safetensors nor a .gguf file"),
        ("{tmp}/weights.txt", "is not a .gguf file"),
        ("{tmp}/broken.gguf", "cannot load the model .*broken.gguf: "),
        ("{tmp}/broken", "cannot load the model .*broken: "),
    ],
)
def test_what_is_no_model_is_said_in_one_sentence(source: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.txt").write_text("x")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    (tmp_path / "broken" / "model.safetensors").write_text("x")
    with pytest.raises(ModelError, match=sentence) as caught:
        load(source.format(tmp=tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for loader in (load, load_tokenizer, load_config):
        with pytest.raises(ModelError, match="cannot load the model nobody/nothing: ") as caught:
            loader("nobody/nothing")
        assert "\n" not in str(caught.value)


def test_a_bare_tokenizer_gets_a_template_and_a_padding_token(
    tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "pad_token"})
    )
    bare = load_tokenizer(str(folder))
    assert bare.chat_template == FALLBACK_CHAT_TEMPLATE
    assert bare.pad_token == bare.eos_token
    assert "has no chat template" in caplog.text


def test_sequence_length_is_capped() -> None:
    assert cap_sequence_length(tiny_llama(), 255) == 255
    assert cap_sequence_length(tiny_llama(), 256) == 256
    assert cap_sequence_length(tiny_llama(), 257) == 256


def test_dtypes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert effective_dtype("fp32", "cpu") == "fp32"
    assert effective_dtype("fp16", "cuda") == "fp16"
    with pytest.raises(HardwareError, match="dtype fp16 needs a GPU"):
        effective_dtype("fp16", "cpu")
    monkeypatch.setattr("lightning_modules.models._has_bf16", lambda device: True)
    assert effective_dtype(None, "cpu") == effective_dtype("bf16", "cpu") == "bf16"
    monkeypatch.setattr("lightning_modules.models._has_bf16", lambda device: False)
    with caplog.at_level(logging.WARNING):
        assert effective_dtype("bf16", "cpu") == "fp32"
    assert "no bf16 instructions" in caplog.text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("flags : fpu avx512f amx_bf16 amx_tile", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f", False),
    ],
)
def test_bf16_of_the_processor(flags: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    assert _has_bf16("cpu", tmp_path / "cpuinfo") is expected
    assert _has_bf16("cpu", tmp_path / "gone") is False
