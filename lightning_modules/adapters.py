"""LoRA and DoRA adapters: which modules get one, under the architecture's own names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from post_training.errors import ModelError
from post_training.schemas.algorithms import LoraFinetuningConfig

log = logging.getLogger(__name__)

ALIASES = {"output_proj": "o_proj"}
"""Other names of the schema's attention projections."""

DEFAULT_NAMES: Mapping[str, str] = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
}

ATTENTION_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt2": dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attn.c_attn") | {"o_proj": "attn.c_proj"},
    "phi3": dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | {"o_proj": "o_proj"},
}
"""Attention projections of the model types that do not use the default names; a module's path ends so."""

DEFAULT_MLP = ("gate_proj", "up_proj", "down_proj")

MLP_NAMES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "phi3": ("gate_up_proj", "down_proj"),
}
"""Feed-forward projections, likewise."""


def add_adapters(model: PreTrainedModel, config: LoraFinetuningConfig, base_model: str) -> PeftModel:
    """Freeze the model and inject trainable fp32 adapters, without dropout.

    A layer computes ``W x + (alpha / rank) · B A x``, with B zero at first: Hu et al.,
    https://arxiv.org/abs/2106.09685, equation 3. With ``use_dora`` each row of ``W + (alpha / rank) · B A``
    is scaled to a trained length, at first the length of W's row: Liu et al.,
    https://arxiv.org/abs/2402.09353, equation 5.

    :param model: also one that :func:`lightning_modules.nf4.quantize_base` has quantized.
    :param base_model: what the saved adapter names as its base.
    :raises ModelError: as :func:`target_modules`.
    """
    targets = target_modules(model, config)
    matching = [path for path, _ in model.named_modules() if _matches(path, targets)]
    names = _adapted(model, targets)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        exclude_modules=[path for path in matching if path not in names] or None,
        use_dora=bool(config.use_dora),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    with warnings.catch_warnings():
        # GPT-2's head is no Conv1D like its other projections; peft settles each by its type.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=True)
    lora.base_model_name_or_path = base_model  # get_peft_model would warn of a name not its own
    log.info("adapters of rank %d on %d modules: %s", config.rank, len(names), ", ".join(targets))
    return adapted


def adapted_layers(model: PreTrainedModel, config: LoraFinetuningConfig) -> dict[str, tuple[int, int]]:
    """Return in_features and out_features of the layers that get an adapter, by their paths.

    :param model: may be on the meta device.
    :raises ModelError: as :func:`target_modules`.
    """
    layers = {path: model.get_submodule(path) for path in _adapted(model, target_modules(model, config))}
    shapes = {path: tuple(cast(nn.Parameter, layer.weight).shape) for path, layer in layers.items()}
    return {
        path: (rows, columns) if isinstance(layers[path], Conv1D) else (columns, rows)
        for path, (rows, columns) in shapes.items()
    }


def target_modules(model: PreTrainedModel, config: LoraFinetuningConfig) -> list[str]:
    """Translate the request into endings of module paths; the output head is a whole path.

    :param model: may be on the meta device: nothing but its structure is looked at.
    :raises ModelError: naming the requested name and the names that exist, if nothing matches; or
        if the output head shares its weight with the embedding.
    """
    kind = model.config.model_type
    attention = ATTENTION_NAMES.get(kind, DEFAULT_NAMES)
    targets: dict[str, str] = {}  # module name -> the name that asked for it
    for requested in config.lora_attn_modules:
        alias = ALIASES.get(requested, requested)
        name = attention.get(alias, alias)
        if name in targets and targets[name] != alias:
            log.info("%s is part of the fused module %s, which gets one adapter", requested, name)
        targets.setdefault(name, alias)
        if name != alias:
            log.info("%s is %s in a %s model", requested, name, kind)
    if config.apply_lora_to_mlp:
        targets |= {name: "apply_lora_to_mlp" for name in MLP_NAMES.get(kind, DEFAULT_MLP)}
    for name, requested in targets.items():
        _check_exists(model, name, requested)
    return [*targets, *([_output_head(model)] if config.apply_lora_to_output else [])]


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return every linear layer but the output head, by its path; the model may be on the meta device.

    :raises ModelError: if the model is a mixture of experts, which transformers holds in other modules: they
        would silently keep their precision.
    """
    experts = [name for name, p in model.named_parameters() if p.ndim > 2 and ".experts." in name]
    if experts:
        kind = model.config.model_type
        raise ModelError(f"the experts of {kind} models cannot be quantized: {experts[0]} is no nn.Linear")
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _adapted(model: PreTrainedModel, targets: list[str]) -> list[str]:
    """Return the paths of the layers that targets mean; of these, the output head is a whole path."""
    wanted = {*_projections(model), *targets}
    return [path for path, _ in model.named_modules() if path in wanted and _matches(path, targets)]


def _matches(path: str, endings: list[str]) -> bool:
    return any(path == ending or path.endswith(f".{ending}") for ending in endings)


def _projections(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers: the text decoder's, and neither the head nor a vision tower's."""
    decoder = set(model.get_decoder().modules())  # type: ignore[no-untyped-call]
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module in decoder
    ]


def _check_exists(model: PreTrainedModel, name: str, requested: str) -> None:
    paths = _projections(model)
    if any(_matches(path, [name]) for path in paths):
        return
    field = "" if requested == "apply_lora_to_mlp" else "lora_attn_modules: "
    existing = sorted({path.rpartition(".")[2] for path in paths})
    raise ModelError(
        f"{field}{requested} matches no module of this {model.config.model_type} model;"
        f" its projections are {', '.join(existing)}"
    )


def _output_head(model: PreTrainedModel) -> str:
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding = model.get_input_embeddings()
    if head.weight is embedding.weight:
        raise ModelError(
            "apply_lora_to_output is refused: this model's output head shares its weight with the input"
            " embedding, so an adapter on it could not be merged"
        )
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[head]
