"""Adapters merged into their base: a model of its own that loads without peft."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_modules.models import save_model
from lightning_modules.nf4 import dequantized, is_quantized
from post_training.errors import DivergenceError

log = logging.getLogger(__name__)


def export_merged(model: PeftModel, folder: Path) -> None:
    """Write config, generation config and merged safetensors weights for plain ``from_pretrained``.

    :param model: with LoRA or DoRA adapters; left as it is.
    :raises DivergenceError: if a merged weight is not finite.
    """
    base = cast(PreTrainedModel, model.get_base_model())
    # What is saved is the model that will load the file: the trained one has other modules.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(base.config), dtype=base.dtype
        )
    plain.generation_config = base.generation_config
    save_model(plain, folder, merged_state_dict(model))


@torch.no_grad()
def merged_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """Merge the adapters' updates into the base's weights, without touching the model.

    A quantized base is dequantized, and rounded to its compute dtype once the update is added.

    :returns: the base model's state dict, under the names that it has without adapters and quantization:
        new tensors on the CPU for what was merged or dequantized, the model's own for the rest.
    :raises DivergenceError: if a merged weight is not finite.
    """
    base = model.get_base_model()
    quantized = any(map(is_quantized, base.modules()))
    if quantized:
        log.warning(
            "merging into a 4-bit base: the merged model has its full size again, and where nothing was"
            " trained the values of the 4-bit weights, not the original ones"
        )
    changed = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) or (is_quantized(module) and not name.endswith(".base_layer"))
    }
    prefixes = tuple(f"{name}." for name in changed)
    state = {name: value for name, value in base.state_dict().items() if not name.startswith(prefixes)}
    for name, module in changed.items():
        layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        weight = _merged(module) if isinstance(module, LoraLayer) else dequantized(module)
        if not torch.isfinite(weight).all():
            raise DivergenceError(f"the merged weight of {name} is not finite")
        state[f"{name}.weight"] = weight.cpu()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()
    return state


def _merged(layer: Any) -> Tensor:
    """Add a LoraLayer's update, as peft computes it, to its base weight; round once, to the base's dtype."""
    base = layer.get_base_layer()
    weight: Tensor = dequantized(base) if is_quantized(base) else base.weight.detach()
    [adapter] = layer.active_adapters
    if adapter in layer.lora_variant:  # DoRA
        weight = layer.lora_variant[adapter].merge_safe(layer, adapter, weight)
    else:
        weight = (weight + layer.get_delta_weight(adapter)).to(weight.dtype)
    return weight
