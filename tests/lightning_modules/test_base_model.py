"""Where a job starts: folders and hub ids, and adapters upon them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, ViTConfig

from lightning_modules import base_model
from lightning_modules.adapters import target_modules
from lightning_modules.base_model import (
    MAX_ADAPTERS,
    Base,
    fingerprint,
    identity_of,
    kept_beyond,
    merge_adapter,
    meta_model,
    unpacked,
)
from lightning_modules.kept import Kept
from lightning_modules.models import load_config, load_model, load_tokenizer
from lightning_modules.process import is_permanent
from post_training.errors import ModelError
from tests.lightning_modules.bases import adapt, find, load, logits, lora, write_adapter, write_gguf
from tests.lightning_modules.tiny import TINY

AdapterMaker = Callable[..., Path]


@pytest.fixture
def make_adapter(tiny_model_dir: Path, tmp_path: Path) -> AdapterMaker:
    """Write an adapter of the tiny model; keywords change its configuration."""

    def make(name: str = "adapter", **changes: Any) -> Path:
        return write_adapter(tmp_path / name, tiny_model_dir, **changes)

    return make


# On disk


def test_a_folder_is_its_own_base(tiny_model_dir: Path, tmp_path: Path) -> None:
    name = str(tiny_model_dir)
    assert find(name, tmp_path) == Base(name=name, source=name, tokenizer_source=name, adapters=())
    assert not (tmp_path / "base").exists()


def test_a_gguf_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    tokens = [*map(chr, range(97, 123)), "ab", *(f"token{i}" for i in range(372)), "<end>"]
    config = copy.deepcopy(TINY["llama"])
    write_gguf(AutoModelForCausalLM.from_config(config), file, tokens)  # type: ignore[no-untyped-call]
    kept, packed = Kept(tmp_path / "kept", 2**30), find(file, tmp_path)
    base = unpacked(packed, kept)
    assert (base.name, base.source) == (str(file), base.tokenizer_source)
    assert base.source != packed.source
    torch.testing.assert_close(logits(load(base.source)), logits(load(file)), rtol=0, atol=0)
    assert load_tokenizer(base.source).eos_token == "<end>"
    assert load_tokenizer(base.source)("cab")["input_ids"] == load_tokenizer(str(file))("cab")["input_ids"]
    monkeypatch.setattr(base_model, "unpack", None)
    assert unpacked(find(file, tmp_path), kept) == base
    with_own_tokenizer = replace(packed, tokenizer_source="another")
    assert unpacked(with_own_tokenizer, kept) == replace(base, tokenizer_source="another")


def test_a_base_from_mlflow_stays_when_its_job_is_gone(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "job" / "base" / "files"
    shutil.copytree(tiny_model_dir, source)
    base = Base("models:/m-1", str(source), str(source))
    stays = kept_beyond(tmp_path / "job" / "base", base, Kept(tmp_path / "kept", 2**30))
    shutil.rmtree(tmp_path / "job")
    assert (stays.name, stays.tokenizer_source) == (base.name, stays.source)
    torch.testing.assert_close(logits(load(stays.source)), logits(load(tiny_model_dir)), rtol=0, atol=0)
    elsewhere = find(tiny_model_dir, tmp_path)
    assert kept_beyond(tmp_path / "job" / "base", elsewhere, Kept(tmp_path / "kept", 2**30)) is elsewhere


def test_safetensors_are_not_unpacked(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = find(tiny_model_dir, tmp_path)
    assert unpacked(base, Kept(tmp_path / "kept", 2**30)) is base
    assert not (tmp_path / "kept").exists()


def test_what_lies_under_a_name_is_known_by_its_content(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    before = identity_of(find(folder, tmp_path))
    assert before[0] == str(folder)
    assert before[1:] == [fingerprint(tiny_model_dir)]
    for unread in ("README.md", "all_results.json", "optimizer.safetensors"):
        (folder / unread).write_text("read by nobody who loads it")
    assert identity_of(find(folder, tmp_path)) == before
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, folder / "model.safetensors")
    assert identity_of(find(folder, tmp_path)) != before


def test_every_adapter_counts(make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter()
    before = identity_of(find(adapter, tmp_path, tiny_model_dir))
    assert before == [str(adapter), fingerprint(adapter), fingerprint(tiny_model_dir)]
    (adapter / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text().replace('"lora_alpha": ', '"lora_alpha": 1')
    )
    assert identity_of(find(adapter, tmp_path, tiny_model_dir)) != before


@pytest.mark.parametrize("size", [0, 1, 65_536, 4_194_304, 4_194_305, 50_000_000])
def test_a_fingerprint_is_of_the_whole_file_or_of_parts_of_it_all(size: int, tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    content = bytearray(size)
    file.write_bytes(content)
    before = fingerprint(file)
    file.write_bytes(content + b"1")
    assert fingerprint(file) != before
    if size:
        content[0] = 1
        file.write_bytes(content)
        assert fingerprint(file) != before
    if 0 < size <= 4_194_304:
        content[0], content[-1] = 0, 1
        file.write_bytes(content)
        assert fingerprint(file) != before


def test_an_adapter_leads_to_its_base(
    make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = make_adapter()
    base = find(folder, tmp_path, tiny_model_dir.parent)
    assert base == Base(str(folder), str(tiny_model_dir), str(tiny_model_dir), (folder,))


def test_the_tokenizer_is_the_adapters_own(
    make_adapter: AdapterMaker, tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = make_adapter()
    own = copy.deepcopy(tokenizer)
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(folder)
    base = find(folder, tmp_path, tiny_model_dir)
    assert base.tokenizer_source == str(folder)
    assert load_tokenizer(base.tokenizer_source).chat_template == own.chat_template
    assert load_tokenizer(base.source).chat_template == tokenizer.chat_template


def test_an_adapter_upon_an_adapter(make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path) -> None:
    first = make_adapter("first")
    merged = merge_adapter(load(tiny_model_dir), first)
    second = tmp_path / "second"
    adapted = adapt(merged, str(first), seed=2)
    adapted.save_pretrained(str(second), save_embedding_layers=False)
    expected = logits(adapted)

    base = find(second, tmp_path, tmp_path, tiny_model_dir)
    assert (base.source, base.adapters) == (str(tiny_model_dir), (first, second))
    model = load(base.source)
    for adapter in base.adapters:
        model = merge_adapter(model, adapter)
    torch.testing.assert_close(logits(model), expected)
    assert (logits(load(base.source)) - expected).abs().max() > 0.1


def test_adapters_in_a_circle_are_refused(make_adapter: AdapterMaker, tmp_path: Path) -> None:
    folder = make_adapter(base_model_name_or_path=str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=f"is more than {MAX_ADAPTERS} adapters upon adapters"):
        find(folder, tmp_path, tmp_path)


@pytest.mark.parametrize("base", ["{model}", "{tmp}/allowed/../outside", "{tmp}/allowed/link", "/etc"])
def test_a_base_outside_the_roots_is_refused(
    base: str, make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "link").symlink_to(tiny_model_dir)
    name = base.format(model=tiny_model_dir, tmp=tmp_path)
    folder = make_adapter(base_model_name_or_path=name)
    with pytest.raises(ModelError, match=f"names the base {name}, under no folder of allowed_roots"):
        find(folder, tmp_path, tmp_path / "allowed")


@pytest.mark.parametrize("base", ["./tiny", "a/b/c", "file:/etc", "https://example.org/m", "~/model", "a b"])
def test_a_base_that_is_no_name_is_refused(base: str, make_adapter: AdapterMaker, tmp_path: Path) -> None:
    folder = make_adapter(base_model_name_or_path=base)
    with pytest.raises(
        ModelError, match=f"must be an absolute path, a hub id or an MLflow URI, got '{base}'"
    ):
        find(folder, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"base_model_name_or_path": None}, "names no base model: base_model_name_or_path is None"),
        ({"peft_type": "PREFIX_TUNING"}, "is of type PREFIX_TUNING: only LORA can be merged"),
        ({"revision": "v2"}, "has revision 'v2', which is not supported"),
        ({"megatron_config": {"a": 1}}, "has megatron_config {'a': 1}, which is not supported"),
    ],
)
def test_adapters_of_other_kinds_are_refused(
    changes: dict[str, Any],
    sentence: str,
    make_adapter: AdapterMaker,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ModelError) as caught:
        find(make_adapter(**changes), tmp_path, tiny_model_dir)
    assert sentence in str(caught.value)
    assert is_permanent(caught.value)


def test_pickled_adapters_are_refused(
    make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = make_adapter()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        find(folder, tmp_path, tiny_model_dir)
    torch.save({}, folder / "adapter_model.bin")
    for call in (
        lambda: find(folder, tmp_path, tiny_model_dir),
        lambda: merge_adapter(load(tiny_model_dir), folder),
    ):
        with pytest.raises(ModelError, match=r"holds only the pickled adapter_model\.bin"):
            call()


def test_a_broken_configuration_is_said_so(make_adapter: AdapterMaker, tmp_path: Path) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"has a broken adapter_config\.json"):
        find(folder, tmp_path, tmp_path)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="is of type"):
        find(folder, tmp_path, tmp_path)


# On the hub, without a network: from its cache


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Put a folder into the hub's cache, as a download would."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, folder: Path) -> None:
        repo = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)

    return put


def test_a_hub_id_stays_one(hub_cache: Callable[[str, Path], None], tmp_path: Path) -> None:
    assert find("org/name", tmp_path) == Base("org/name", "org/name", "org/name")


def test_a_hub_model_is_known_by_its_commit(
    hub_cache: Callable[[str, Path], None], tiny_model_dir: Path, tmp_path: Path
) -> None:
    hub_cache("org/base", tiny_model_dir)
    base = find("org/base", tmp_path)
    load_config(base.source)
    assert identity_of(base) == ["org/base", "0" * 40]
    repo = tmp_path / "hub" / "models--org--base"
    (repo / "snapshots" / ("0" * 40)).rename(repo / "snapshots" / ("1" * 40))
    (repo / "refs" / "main").write_text("1" * 40)
    load_config(base.source)
    assert identity_of(base) == ["org/base", "1" * 40]


def test_an_adapter_on_the_hub(
    hub_cache: Callable[[str, Path], None], make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path
) -> None:
    hub_cache("org/lora", make_adapter(base_model_name_or_path="org/base"))
    hub_cache("org/base", tiny_model_dir)
    base = find("org/lora", tmp_path)
    assert (base.name, base.source, base.tokenizer_source) == ("org/lora", "org/base", "org/base")
    (adapter,) = base.adapters
    assert adapter.is_relative_to(tmp_path / "hub")
    expected = logits(merge_adapter(load(tiny_model_dir), make_adapter()))
    torch.testing.assert_close(logits(merge_adapter(load("org/base"), adapter)), expected)


def test_an_adapter_on_the_hub_does_not_lead_out_of_the_roots(
    hub_cache: Callable[[str, Path], None], make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = make_adapter()  # names the tiny model's path
    shutil.copy(tiny_model_dir / "config.json", folder)
    hub_cache("org/lora", folder)
    with pytest.raises(ModelError, match="under no folder of allowed_roots"):
        find("org/lora", tmp_path)


# Merging


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"apply_lora_to_mlp": True, "apply_lora_to_output": True}),
        ("llama", {"use_dora": True}),
        ("gpt2", {"apply_lora_to_mlp": True, "apply_lora_to_output": True}),
        ("phi3", {"apply_lora_to_mlp": True}),
    ],
)
def test_merging_changes_no_output(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(TINY[kind]))  # type: ignore[no-untyped-call]
    plain = copy.deepcopy(base)
    adapted = adapt(copy.deepcopy(base), "base", seed=1, **changes)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)

    merged = merge_adapter(base.train(), tmp_path / "adapter")
    assert merged is base
    assert not merged.training
    torch.testing.assert_close(logits(merged), logits(adapted))
    assert (logits(merged) - logits(plain)).abs().max() > 0.01
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not [name for name in vars(merged) if "peft" in name]


def test_a_merged_model_takes_new_adapters_and_is_their_reference(
    make_adapter: AdapterMaker, tiny_model_dir: Path
) -> None:
    merged = merge_adapter(load(tiny_model_dir), make_adapter())
    reference = logits(merged)
    adapted = adapt(merged, "base", seed=3)
    assert (logits(adapted) - reference).abs().max() > 0.01
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), reference, rtol=0, atol=0)


def test_a_merge_keeps_the_bases_type(make_adapter: AdapterMaker, tiny_model_dir: Path) -> None:
    model = load_model(str(tiny_model_dir), dtype=torch.bfloat16)
    merged = merge_adapter(model, make_adapter())
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_an_adapter_of_another_model_is_refused(make_adapter: AdapterMaker, tiny_model_dir: Path) -> None:
    other = AutoModelForCausalLM.from_config(copy.deepcopy(TINY["gpt2"]))  # type: ignore[no-untyped-call]
    with pytest.raises(ModelError, match=r"does not fit the model: .*q_proj") as caught:
        merge_adapter(other, make_adapter())
    assert "\n" not in str(caught.value)
    wide = copy.deepcopy(TINY["llama"])
    wide.update({"hidden_size": 64, "vocab_size": 400})
    with pytest.raises(ModelError, match=r"does not fit the model: .*size mismatch"):
        merge_adapter(AutoModelForCausalLM.from_config(wide), make_adapter())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (["q_proj"], "4 of its weights have no module, the first is .*v_proj"),
        (["q_proj", "k_proj", "v_proj"], "4 of its modules have no weights, the first is .*k_proj"),
    ],
)
def test_an_adapter_that_does_not_match_its_configuration_is_refused(
    targets: list[str], sentence: str, make_adapter: AdapterMaker, tiny_model_dir: Path
) -> None:
    with pytest.raises(ModelError, match=sentence):
        merge_adapter(load(tiny_model_dir), make_adapter(target_modules=targets))


def test_weights_that_are_not_finite_are_refused(make_adapter: AdapterMaker, tiny_model_dir: Path) -> None:
    folder = make_adapter()
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ModelError, match="NaNs"):
        merge_adapter(load(tiny_model_dir), folder)


def test_an_adapter_names_no_code(
    make_adapter: AdapterMaker, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)  # as the working folder of python -m is
    folder = make_adapter(megatron_config={"x": 1}, megatron_core="evil")
    with pytest.raises(ModelError, match="megatron_config"):
        merge_adapter(load(tiny_model_dir), folder)
    assert not (tmp_path / "ran").exists()


# Without weights


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TINY)
def test_a_model_without_weights(kind: str, tied: bool) -> None:
    config = copy.deepcopy(TINY[kind])
    config.update({"tie_word_embeddings": tied})
    model = meta_model(config)
    assert config._attn_implementation is None, "a model chooses one and writes it there"
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    real = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # type: ignore[no-untyped-call]
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    embedding = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is embedding) is tied  # type: ignore[no-untyped-call]


def test_a_configuration_chooses_no_kernel(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    values = json.loads((folder / "config.json").read_text())
    for name in ("attn_implementation", "_attn_implementation"):
        changed = {**values, name: "kernels-community/flash-attn"}
        (folder / "config.json").write_text(json.dumps(changed))
        assert meta_model(load_config(str(folder))).config._attn_implementation == "eager"


def test_targets_are_known_without_weights(tiny_model_dir: Path) -> None:
    model = meta_model(load_config(str(tiny_model_dir)))
    assert target_modules(model, lora(apply_lora_to_output=True)) == ["q_proj", "v_proj", "lm_head"]
    with pytest.raises(ModelError, match="qq_proj matches no module"):
        target_modules(model, lora(lora_attn_modules=["qq_proj"]))


def test_a_configuration_of_no_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot load the model vit"):
        meta_model(ViTConfig())
