"""The model that a job starts from: one on disk, in MLflow or on the hub, adapters merged in."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME as CONFIG_FILE
from transformers.utils.peft_utils import find_adapter_config_file

from lightning_modules.kept import Kept, alone, link_tree, make
from lightning_modules.mlflow_uris import LOOKUPS, resolve
from lightning_modules.models import TOKENIZER_FILE, as_model_error, locate, unpack
from post_training.errors import ModelError
from post_training.places import lies_under, may_be_used
from post_training.schemas.trainer import TrackingTarget

log = logging.getLogger(__name__)

MAX_ADAPTERS = 8
"""Adapters upon adapters; more is taken for a circle."""

MAX_REASON = 300
"""Characters of another library's error that are passed on."""

MODEL_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*.gguf",
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
"""What a model, an adapter or their tokenizer is loaded from."""

SAMPLES, SAMPLE_BYTES = 64, 65_536

HUB_ADAPTER_FILES = [SAFETENSORS_WEIGHTS_NAME, "*.json", "*.jinja", "*.model", "*.txt"]
ADAPTER_LIMITS: dict[str, tuple[Any, ...]] = {
    "megatron_config": (None,),  # PEFT would import the module that it names, from the working folder too
    "revision": (None, "main"),  # of the base, which is loaded at its newest
}
"""Entries of an adapter's configuration that may hold nothing else."""

FILES, NAME_FILE = "files", "name.txt"
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED")
"""MLflow's words for what asking again would not change; a proxy that finds no server has none of them."""


@dataclass(frozen=True)
class Base:
    """What a job starts from.

    :param name: what an adapter that is trained on it names as its base: the name that was given, an alias
        replaced by the version that it stood for.
    :param source: the base model, as ``load_config`` and ``load_model`` take it.
    :param tokenizer_source: the same for ``load_tokenizer``; an adapter's own where it has one, for its chat
        template.
    :param adapters: folders of the adapters to merge into it, in this order.
    """

    name: str
    source: str
    tokenizer_source: str
    adapters: tuple[Path, ...] = ()


def find_base(model: str, folder: Path, tracking: TrackingTarget | None, roots: Sequence[Path]) -> Base:
    """Find the model to start from, and the adapters that lead to it.

    :param model: an absolute path, a hub id, or a URI of scheme models, runs or mlflow-artifacts.
    :param folder: receives what comes from MLflow, complete or not at all; a retry finds it there.
    :param tracking: the job's own, whose server the URIs mean.
    :param roots: where a base that an adapter names may lie on this machine, or a store that MLflow names.
    :raises ModelError: if something is missing, not allowed or cannot be merged; its cause is an OSError
        where another attempt may succeed.
    """
    name, source = _fetched(model, folder, tracking, roots)
    adapters: list[Path] = []
    while (adapter := _adapter_at(source)) is not None:
        if len(adapters) == MAX_ADAPTERS:
            raise ModelError(f"the model {model} is more than {MAX_ADAPTERS} adapters upon adapters")
        adapters.append(adapter)
        base_name, source = _fetched(_base_of(adapter, roots), folder, tracking, roots)
        log.info("the adapter %s is merged into %s", adapter, base_name)
    tokenizers = [str(adapter) for adapter in adapters if (adapter / TOKENIZER_FILE).is_file()]
    return Base(name, source, [*tokenizers, source][0], tuple(reversed(adapters)))


def unpacked(base: Base, kept: Kept) -> Base:
    """Return the same base in safetensors, which are mapped; a gguf file takes seconds to parse.

    :raises ModelError: if it cannot be read.
    """
    location, file = locate(base.source)
    if file is None:
        return base
    folder = kept.place("models", fingerprint(Path(location, file))) / "safetensors"
    with alone(folder):
        if not folder.exists():
            log.info("unpacking %s, once", base.source)
            make(folder, partial(unpack, base.source))
    return _moved(base, folder)


def kept_beyond(folder: Path, base: Base, kept: Kept) -> Base:
    """Return the same base where it stays when a job's own folder goes: its adapter is loaded upon it.

    One that cannot be kept is used where it is: the adapter's users must then say where the base is.

    :param folder: the job's, for models from MLflow.
    """
    source = Path(base.source)
    if not source.is_relative_to(folder):
        return base
    place = kept.place("models", fingerprint(source)) / FILES
    try:
        with alone(place):
            if not place.exists():
                make(place, partial(link_tree, source))
    except OSError as error:  # no room for a copy, where there are no links
        log.warning("the base %s is not kept for those who load its adapters: %s", base.name, error)
        return base
    return _moved(base, place)


def _moved(base: Base, folder: Path) -> Base:
    """Return the same base at another place; a tokenizer of its own stays where it is."""
    tokenizer = str(folder) if base.tokenizer_source == base.source else base.tokenizer_source
    return replace(base, source=str(folder), tokenizer_source=tokenizer)


def identity_of(base: Base) -> list[str]:
    """Return what tells a base from others of its name: its version, or commit, and the content of its files.

    :param base: one whose configuration was loaded: only then has the hub said which commit it is.
    """
    source = Path(base.source)
    of_base = fingerprint(source) if source.is_absolute() else _commit_of(base.source)
    return [base.name, *map(fingerprint, base.adapters), of_base]


def _commit_of(hub_id: str) -> str:
    """Return the commit that the hub's cache has as the newest, empty if it has none."""
    found = try_to_load_from_cache(hub_id, CONFIG_FILE)
    return Path(found).parent.name if isinstance(found, str) else ""


def fingerprint(place: Path) -> str:
    """Return a SHA-256 of a model's files, in hexadecimal digits: of their names, sizes and samples.

    A file of up to 4 MiB is read whole; of a larger one parts are, evenly from its beginning to its end:
    training changes weights everywhere, and a model may have more gigabytes than its job has minutes.

    :param place: a folder, or a single file.
    """
    files = [place]
    if place.is_dir():
        files = sorted(file for pattern in MODEL_FILES for file in place.glob(pattern) if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if file != place else ''}\0{size}\0".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                content.seek(start)
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge a LoRA or DoRA adapter into its base, in place; every weight of the result requires gradients.

    The result keeps the type of the base's weights, and is rounded to it.

    :param folder: with the adapter's configuration and its weights in safetensors.
    :raises ModelError: if it is no such adapter, or does not fit the model.
    """
    adapted = attach_adapter(model, folder)
    with _fitting(folder):
        merged = cast(Any, adapted).merge_and_unload(safe_merge=True)  # its tuner's method
    return cast(PreTrainedModel, merged.requires_grad_(True).eval())


def attach_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put a LoRA or DoRA adapter beside the weights of its base, which are left as they are.

    :param folder: with the adapter's configuration and its weights in safetensors.
    :raises ModelError: if it is no such adapter, or does not fit the model.
    """
    _adapter_config(folder)
    weights = _adapter_weights(folder)
    with _fitting(folder), warnings.catch_warnings():
        # GPT-2's head is no Conv1D like its other projections; peft settles each by its type.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        adapted = PeftModel(model, LoraConfig.from_pretrained(str(folder), inference_mode=True))
        loaded: Any = set_peft_model_state_dict(adapted, load_file(weights))
        _check_names(loaded.missing_keys, loaded.unexpected_keys)
    return adapted


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PEFT's and torch's: shapes, names, values that are not finite
        raise ModelError(f"the adapter {folder} does not fit the model: {_squeezed(error)}") from error


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model without weights, on the meta device: names and shapes, in milliseconds.

    :raises ModelError: if there is no causal language model of this kind.
    """
    with as_model_error(config.name_or_path or config.model_type), torch.device("meta"):
        # A copy: the model shares its configuration and changes it. Left to the configuration, attention
        # could be a kernel that is fetched and run.
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), trust_remote_code=False, attn_implementation="eager"
        )
    return cast(PreTrainedModel, model)


def _fetched(
    model: str, folder: Path, tracking: TrackingTarget | None, roots: Sequence[Path]
) -> tuple[str, str]:
    """Return the name to remember and the place on this machine, which for a hub id is its name."""
    parts = urlsplit(model)
    if parts.scheme not in LOOKUPS:
        return model, model
    if tracking is None:
        raise ModelError(f"the model {model} lies on an MLflow server, and this job has none")
    if parts.netloc:
        raise ModelError(f"the model {model} must name no host: the job's own MLflow server is meant")
    kept = folder / hashlib.sha256(model.encode()).hexdigest()[:16]
    if not kept.exists():
        with _answers(model):
            _download(model, kept, tracking.tracking_uri, roots)
    (source,) = (kept / FILES).iterdir()
    return (kept / NAME_FILE).read_text(), str(source)


def _download(uri: str, target: Path, tracking_uri: str, roots: Sequence[Path]) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415 - seconds, only models in MLflow need it
    from mlflow.artifacts import download_artifacts  # noqa: PLC0415

    name, location = resolve(MlflowClient(tracking_uri, registry_uri=tracking_uri), uri)
    if not may_be_used(location, roots):
        raise ModelError(f"MLflow keeps the model {uri} in {location}, under no folder of allowed_roots")
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    download_artifacts(
        location, dst_path=str(temporary / FILES), tracking_uri=tracking_uri, registry_uri=tracking_uri
    )
    (temporary / NAME_FILE).write_text(name)
    os.replace(temporary, target)
    log.info("%s came from MLflow: %s", name, location)


def _adapter_at(source: str) -> Path | None:
    """Return the folder of the adapter at a source; None is a model of its own."""
    if Path(source).is_absolute():
        return Path(source) if (Path(source) / CONFIG_NAME).is_file() else None
    with as_model_error(source):
        # Left to itself, transformers would follow an adapter on the hub to whatever base it names.
        if find_adapter_config_file(source) is None:
            return None
        return Path(snapshot_download(source, allow_patterns=HUB_ADAPTER_FILES))


def _base_of(adapter: Path, roots: Sequence[Path]) -> str:
    """Return the base that an adapter names.

    :raises ModelError: if it is neither a hub id, nor a path under one of ``roots``, nor in MLflow.
    """
    config = _adapter_config(adapter)
    _adapter_weights(adapter)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"the adapter {adapter} names no base model: base_model_name_or_path is {base!r}")
    if Path(base).is_absolute():
        if not lies_under(base, roots):
            raise ModelError(f"the adapter {adapter} names the base {base}, under no folder of allowed_roots")
        return base
    if urlsplit(base).scheme not in LOOKUPS:
        try:
            validate_repo_id(base)
        except HFValidationError:
            rule = "must be an absolute path, a hub id or an MLflow URI"
            raise ModelError(f"the base that the adapter {adapter} names {rule}, got {base!r}") from None
    return base


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """Read an adapter's configuration.

    :raises ModelError: if it describes something else than a LoRA that can be merged into its base.
    """
    try:
        config = json.loads((adapter / CONFIG_NAME).read_bytes())
    except ValueError as error:
        raise ModelError(f"the adapter {adapter} has a broken {CONFIG_NAME}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ModelError(f"the adapter {adapter} is of type {kind}: only LORA can be merged")
    for key, allowed in ADAPTER_LIMITS.items():
        if config.get(key) not in allowed:
            raise ModelError(f"the adapter {adapter} has {key} {config[key]!r}, which is not supported")
    return config


def _adapter_weights(adapter: Path) -> Path:
    """Return the file of an adapter's weights.

    :raises ModelError: if it has none that are safe to read.
    """
    if (weights := adapter / SAFETENSORS_WEIGHTS_NAME).is_file():
        return weights
    if (adapter / WEIGHTS_NAME).exists():
        raise ModelError(
            f"the adapter {adapter} holds only the pickled {WEIGHTS_NAME}, which can run code when read:"
            f" save it as {SAFETENSORS_WEIGHTS_NAME}"
        )
    raise ModelError(f"the adapter {adapter} holds no {SAFETENSORS_WEIGHTS_NAME}")


def _check_names(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """PEFT leaves weights without a module out, and modules without weights untrained."""
    problems = {
        "its weights have no module": list(unexpected),
        "its modules have no weights": [name for name in missing if "lora_" in name],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{len(names)} of {problem}, the first is {names[0]}")


@contextmanager
def _answers(uri: str) -> Iterator[None]:
    """Turn what MLflow's client raises into one sentence, its cause an OSError unless MLflow refuses."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # MLflow's, its HTTP client's, an object store's
        reason = _squeezed(error)
        refused = any(word in str(error) for word in REFUSALS)
        cause = error if isinstance(error, OSError) else ConnectionError(reason)
        raise ModelError(f"MLflow does not give the model {uri}: {reason}") from (None if refused else cause)


def _squeezed(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} …"
