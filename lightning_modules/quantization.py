"""Quantization-aware training: 4-bit weights imitated in the forward pass, and really made on export.

A weight's groups along in_features have one scale each and levels from -8 to 7; its gradient passes the
rounding unchanged. Embeddings and the output head keep their precision.

References: Jacob et al., https://arxiv.org/abs/1712.05877, section 3 (training with simulated
quantization); torchao's ``QATConfig``, https://docs.pytorch.org/ao/stable/ .
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import QATConfig
from torchao.quantization.qat.linear import FakeQuantizedLinear
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from lightning_modules.adapters import linear_layers, target_modules
from post_training.errors import ModelError
from post_training.schemas.algorithms import LoraFinetuningConfig, QATFinetuningConfig, Quantizer

log = logging.getLogger(__name__)

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]

QUANTIZERS: Mapping[Quantizer, Callable[[int], AOBaseConfig]] = {
    Quantizer.int8_dynamic_activation_int4_weight: lambda group_size: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=INT4, weight_granularity=PerGroup(group_size)
    ),
    Quantizer.int4_weight_only: lambda group_size: IntxWeightOnlyConfig(
        weight_dtype=INT4, granularity=PerGroup(group_size)
    ),
}
"""torchao's scheme of each quantizer for a group size.

Saved, each level takes a byte: torchao 0.18 has no packed form of either scheme that safetensors can hold
and a CPU can compute with.
"""

REFUSED_ADAPTER_FIELDS = ("use_dora", "quantize_base")


def check_group_size(model: PreTrainedModel, config: QATFinetuningConfig) -> None:
    """Check that groups fill every layer that is quantized; the model may be on the meta device.

    :raises ModelError: if no layer can be quantized; if the group size is 1 or does not divide a layer's
        in_features, naming the layer and the sizes that fit all of them.
    """
    layers = linear_layers(model)
    if not layers:
        kind = model.config.model_type
        raise ModelError(f"QAT is refused: this {kind} model has no nn.Linear layer besides its output head")
    common = math.gcd(*(layer.in_features for layer in layers.values()))
    fitting = [size for size in range(2, common + 1) if common % size == 0]
    if config.group_size in fitting:
        return
    name, features = next(
        (name, layer.in_features)
        for name, layer in layers.items()
        if config.group_size == 1 or layer.in_features % config.group_size
    )
    raise ModelError(
        f"group_size {config.group_size} does not fit {name}, whose in_features is {features};"
        f" group sizes that fit every layer: {', '.join(map(str, fitting)) or 'none'}"
    )


def prepare(
    model: PreTrainedModel, config: QATFinetuningConfig, adapter: LoraFinetuningConfig | None = None
) -> None:
    """Fake-quantize every linear layer but the output head, in place; parameters keep their names.

    :param model: in fp32, to be trained so or under autocast.
    :param adapter: if given, low-rank updates are trained alone, each quantized together with the frozen
        weight that it changes; otherwise every parameter is trained.
    :raises ModelError: as :func:`check_group_size`; if the adapter cannot be trained.
    """
    check_group_size(model, config)
    endings = () if adapter is None else _adapted(model, adapter)
    layers = linear_layers(model)
    scheme = QATConfig(QUANTIZERS[config.quantizer_name](config.group_size), step="prepare")
    quantize_(model, scheme, filter_fn=lambda _, name: name in layers)
    model.requires_grad_(adapter is None)
    if adapter is not None:
        _add_updates(model, adapter, endings)
    log.info("%s in groups of %d on %d layers", config.quantizer_name.value, config.group_size, len(layers))


@torch.no_grad()
def quantized_copy(model: PreTrainedModel, config: QATFinetuningConfig) -> PreTrainedModel:
    """Make a quantized model, ready to be saved, of a prepared one or of one that never was.

    Scales, embeddings, norms and head keep the model's dtype: of an fp32 model the copy has the very
    logits that fake quantization gave. It shares what it does not quantize with the model, which is left
    as it was: save it before training goes on.
    """
    scheme = QUANTIZERS[config.quantizer_name](config.group_size)
    quantized: Any = _sharing_copy(model)
    names: dict[nn.Module, str] = {module: name for name, module in quantized.named_modules()}
    head = quantized.get_output_embeddings()
    for layer in filter(_is_linear, names):
        plain = _plain(layer) if isinstance(layer, FakeQuantizedLinear) else layer
        quantized.set_submodule(names[layer], plain)
        if layer is not head:
            quantize_(plain, scheme)
    # In place of what a model that came from a quantized file has here.
    quantized.config.quantization_config = TorchAoConfig(scheme, modules_to_not_convert=[names[head]])
    quantized.hf_quantizer = AutoHfQuantizer.from_config(quantized.config.quantization_config)
    answer: PreTrainedModel = quantized.eval()
    return answer


class LowRankUpdate(nn.Module):
    """A frozen weight W (out, in) with its trained update: W + (alpha / rank) · B·A.

    In front of a fake quantizer the update learns which levels to move, so merging it loses nothing.

    References: Hu et al., https://arxiv.org/abs/2106.09685, section 4.1; Bondarenko et al.,
    "Low-Rank Quantization-Aware Training for LLMs", https://arxiv.org/abs/2406.06385.

    :param layer: the linear layer of that weight.
    :param rank: r of A (r, in) and B (out, r), which are in fp32; B begins as zero.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        device = layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        self.scaling = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight (out, in)."""
        # Rounded to bf16 by autocast, it would fall on other levels than when it is merged.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scaling)


def _adapted(model: PreTrainedModel, adapter: LoraFinetuningConfig) -> tuple[str, ...]:
    """Return how the paths of the adapted layers end, a dot before each."""
    for field in REFUSED_ADAPTER_FIELDS:
        if getattr(adapter, field):
            raise ModelError(f"runtime.adapter.{field} is refused: QAT cannot train such an adapter")
    return tuple(f".{target}" for target in target_modules(model, adapter))


def _add_updates(model: PreTrainedModel, adapter: LoraFinetuningConfig, endings: tuple[str, ...]) -> None:
    for name, layer in list(model.named_modules()):
        if not _is_linear(layer) or not f".{name}".endswith(endings):
            continue
        if not isinstance(layer, FakeQuantizedLinear):  # the output head: updated, not quantized
            layer = FakeQuantizedLinear.from_linear(layer)
            model.set_submodule(name, layer)
        update = LowRankUpdate(layer, adapter.rank, adapter.alpha)
        layer.weight_fake_quantizer = nn.Sequential(update, layer.weight_fake_quantizer or nn.Identity())


def _plain(layer: FakeQuantizedLinear) -> nn.Linear:
    """Return a layer that has the weight, updated, which the given one quantizes."""
    weight, stages = layer.weight, layer.weight_fake_quantizer
    if isinstance(stages, nn.Sequential):
        weight = stages[0](weight)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules and not their tensors, which stay tied where they are."""
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
