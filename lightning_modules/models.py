"""The base model and its tokenizer, from safetensors or gguf only."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from post_training.errors import HardwareError, ModelError

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FALLBACK_CHAT_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ message['role'] + ':\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""For tokenizers without a template: the role on a line of its own, the text, the end token.

It is saved with every checkpoint, so that whoever uses the model speaks to it in the same form.
"""

PICKLE_SUFFIXES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILE = "tokenizer_config.json"


def effective_dtype(requested: str | None, device: str) -> str:
    """Return the dtype that is used for a requested one: ``bf16``, ``fp16`` or ``fp32``.

    bf16 becomes fp32 where the processor has no instructions for it: there it is slower and coarser.

    :param requested: as in the request; None is bf16.
    :param device: ``cpu`` or ``cuda``.
    :raises HardwareError: for fp16 on a CPU.
    """
    dtype = requested or "bf16"
    if dtype == "fp16" and device == "cpu":
        raise HardwareError("dtype fp16 needs a GPU: on this machine's CPU use bf16 or fp32")
    if dtype == "bf16" and not _has_bf16(device):
        log.warning("this machine's %s has no bf16 instructions: training in fp32", device)
        return "fp32"
    return dtype


def _has_bf16(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = set(re.findall(r"\w+", cpuinfo.read_text())) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def load_model(source: str, *, dtype: torch.dtype, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """Load the base model in evaluation mode, on the CPU, with attention as it is written (eager).

    :param source: a folder with safetensors, a ``.gguf`` file, or a hub id.
    :param dtype: type of the weights.
    :param config: its configuration where it was loaded before: a gguf file takes seconds to parse.
    :raises ModelError: if it cannot be found or read, has no safe weights, or is quantized.
    """
    config = config or load_config(source)
    location, file = locate(source)
    # Left packed, the weights of a gguf file could be neither trained nor saved.
    options: dict[str, Any] = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}
    with as_model_error(source):
        model = AutoModelForCausalLM.from_pretrained(
            location,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=False,
            **({"use_safetensors": True} if file is None else options),
        )
    return cast(PreTrainedModel, model)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer; give it a padding token and a chat template where it lacks them.

    :param source: as of ``load_model``, or any folder with a tokenizer, such as an adapter's.
    :raises ModelError: if it cannot be found, is not a fast one, or has no end token.
    """
    tokenizer = _read_tokenizer(source)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {source} gives no character offsets, which the loss mask needs")
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {source} has no end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        log.warning("the tokenizer of %s has no chat template: a plain one is used and saved", source)
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    return tokenizer


def _read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    location, file = (source, None) if (Path(source) / TOKENIZER_FILE).is_file() else locate(source)
    with as_model_error(source):
        tokenizer = AutoTokenizer.from_pretrained(
            location, trust_remote_code=False, **({} if file is None else {"gguf_file": file})
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def unpack(source: str, folder: Path) -> None:
    """Write a model that is packed in a gguf file, and its tokenizer, into a folder of safetensors, in fp32.

    :raises ModelError: if it cannot be read.
    """
    save_model(load_model(source, dtype=torch.float32), folder)
    _read_tokenizer(source).save_pretrained(folder)


def load_config(source: str, *, quantized: bool = False) -> PretrainedConfig:
    """Load the model's configuration alone.

    :param quantized: whether it may be that of a quantized model, which nothing can be trained on.
    :raises ModelError: if it cannot be found or read, or is that of a quantized model.
    """
    location, file = locate(source)
    with as_model_error(source):
        config = AutoConfig.from_pretrained(
            location, trust_remote_code=False, **({} if file is None else {"gguf_file": file})
        )
    if (quantization := getattr(config, "quantization_config", None)) is not None and not quantized:
        method = quantization.get("quant_method")
        raise ModelError(f"the model {source} is quantized ({method}): start from the unquantized one")
    return cast(PretrainedConfig, config)


def save_model(model: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write config, generation config and safetensors weights for ``from_pretrained``.

    :param state_dict: weights to write instead of the model's own, under the same names.
    """
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    finally:
        model.generation_config = generation
    if generation is not None:
        # not by its own save_pretrained, which refuses settings that from_pretrained takes
        generation.to_json_file(folder / "generation_config.json")


def cap_sequence_length(config: PretrainedConfig, requested: int) -> int:
    """Return the requested length in tokens, or the model's own limit where that is shorter."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None or requested <= limit:
        return requested
    return int(limit)


def locate(source: str) -> tuple[str, str | None]:
    """Split a source into what transformers loads from and the name of a gguf file in it."""
    path = Path(source)
    if not path.is_absolute() and not source.startswith("."):
        return source, None  # a hub id, also where a folder of that name lies in the working folder
    if path.is_dir():
        return source, _check_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"the model file {source} is not a .gguf file")
        return str(path.parent), path.name
    raise ModelError(f"the model {source} does not exist")


def _check_folder(folder: Path) -> str | None:
    """Return the folder's gguf file if it has no safetensors, or raise if it has neither."""
    if (folder / "adapter_config.json").is_file():  # transformers would add it to whatever base it names
        raise ModelError(f"the model folder {folder} holds an adapter; name the folder of a base model")
    if any(folder.glob("*.safetensors")):
        if not (folder / "config.json").is_file():
            raise ModelError(f"the model folder {folder} holds no model: config.json is missing")
        return None
    gguf = sorted(folder.glob("*.gguf"))
    if len(gguf) == 1:
        return gguf[0].name
    if gguf:
        raise ModelError(f"the model folder {folder} holds {len(gguf)} .gguf files: name one of them")
    if any(any(folder.glob(pattern)) for pattern in PICKLE_SUFFIXES):
        raise ModelError(
            f"the model folder {folder} holds pickled weights only, which can run code when read:"
            " save them as safetensors"
        )
    raise ModelError(f"the model folder {folder} holds neither safetensors nor a .gguf file")


@contextmanager
def as_model_error(source: str) -> Iterator[None]:
    """Reduce whatever the loaders raise to one sentence; their messages fill screens.

    :raises ModelError: naming the model, from what was raised.
    """
    try:
        yield
    except Exception as error:  # OSError, ValueError, ImportError, safetensors' and the hub's own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"cannot load the model {source}: {lines[0] if lines else type(error).__name__}"
        ) from error
