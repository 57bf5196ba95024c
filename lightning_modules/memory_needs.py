"""What a training needs of memory, before its weights are read: a part that is certain, and activations.

The formulas are those of what :mod:`lightning_modules.engine` keeps of a dense decoder for the backward
pass. Transformers' own functions, which stay where it does not know an architecture, keep more. Of
SmolLM2-135M on a CPU, with steps of one sequence or pair of 512 and 2,048 tokens, the estimate was from 5 %
below to 1 % above the peak that was measured: LoRA, QLoRA, DPO, full fine-tuning, QAT (docs/scaling.md). None
is measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from lightning_modules.adapters import adapted_layers, linear_layers
from lightning_modules.engine.tiles import Layout, cut, group
from lightning_modules.logprobs import chunk_rows
from lightning_modules.models import DTYPES
from lightning_modules.nf4 import BLOCK, SCALE_BLOCK, quantizable
from lightning_modules.setting import Setting
from lightning_modules.workload import Largest
from post_training.schemas.algorithms import QATFinetuningConfig, Quantizer
from post_training.schemas.requests import PreferenceOptimizeRequest
from post_training.schemas.training import OptimizerType

FP32 = 4
NF4 = 0.5 + (1 + FP32 / SCALE_BLOCK) / BLOCK
"""Bytes of a weight in NF4, with its part of the scales."""

MOMENTS = {OptimizerType.adam: 2, OptimizerType.adamw: 2, OptimizerType.sgd: 0}
"""fp32 numbers that an optimizer keeps for each one that is trained."""

OUTPUT_NAMES = {"o_proj", "output_proj"}

SCORES = 4
"""Tensors of a group's size that the backward pass of a CPU's attention has at once: ``_TileAttention``'s."""


@dataclass(frozen=True)
class Certain:
    """Bytes that a training needs whatever its batches are.

    :param loading: what the base model takes on the host when it is read, before it is quantized.
    """

    weights: int
    gradients: int
    optimizer: int
    loading: int

    @property
    def training(self) -> int:
        """What lies on the device while it trains."""
        return self.weights + self.gradients + self.optimizer


def certain(setting: Setting, outline: PreTrainedModel) -> Certain:
    """Return what a training needs for certain.

    Gradients and the optimizer's moments are fp32; so are weights that are trained.

    :param outline: the base model on the meta device.
    """
    request, parameters = setting.spec.request, outline.num_parameters()
    width = DTYPES[setting.dtype].itemsize if setting.algorithm.weights.frozen_base else FP32
    weights = loading = parameters * width
    trained = parameters
    if request.adapters is not None:
        trained = adapter_parameters(setting, outline)
        weights += trained * FP32
        if request.adapters.quantize_base:
            quantized = sum(layer.weight.numel() for layer in quantizable(outline).values())
            weights -= int(quantized * (width - NF4))
    optimizer = request.training_config.optimizer_config
    moments = MOMENTS[OptimizerType.adamw if optimizer is None else optimizer.optimizer_type]
    parts = setting.ranks.world if setting.sharded else 1
    gradients = trained * FP32
    return Certain(weights // parts, gradients // parts, gradients * moments // parts, loading)


def adapter_parameters(setting: Setting, outline: PreTrainedModel) -> int:
    """Return the number of parameters of the adapters: A (r, in), B (out, r), and DoRA's lengths (out)."""
    config = setting.spec.request.adapters
    assert config is not None  # noqa: S101 - asked by who has looked
    shapes = adapted_layers(outline, config).values()
    lengths = sum(outputs for _, outputs in shapes) if config.use_dora else 0
    return config.rank * sum(inputs + outputs for inputs, outputs in shapes) + lengths


def activations(setting: Setting, outline: PreTrainedModel, batch: Largest, *, padded: bool) -> int:
    """Return the bytes that come on top of the certain part at the end of a forward pass.

    :param padded: whether rows are padded: then attention is transformers' own.
    """
    config = outline.config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    width, kept = DTYPES[setting.dtype].itemsize, kept_of_layer(setting, outline)
    if padded and setting.runtime.attn_implementation == "eager":
        kept += config.num_attention_heads * batch.width * (FP32 + width)  # its weights, and them rounded
    if setting.efficiency.enable_activation_checkpointing:
        of_layers = layers * hidden * FP32 + kept
    else:
        of_layers = layers * kept
    ends = 2 * hidden * FP32  # what goes into the head, and its gradient
    logits = 2 * min(chunk_rows(config), batch.tokens) * int(config.vocab_size) * width
    return batch.tokens * (of_layers + ends) + logits + _copies_of_weights(setting, outline)


def scores_on_cpu(setting: Setting, outline: PreTrainedModel, batch: Largest) -> int:
    """Return the bytes of what a CPU's attention makes of queries and keys: masks, and a group's scores.

    Of rows without padding, each a sequence, or two of one length. A GPU's attention keeps none of it.
    """
    config = outline.config.get_text_config()
    sequences = 2 if isinstance(setting.spec.request, PreferenceOptimizeRequest) else 1
    rows = Layout.of_rows(sequences * (batch.tokens // batch.width), max(1, batch.width // sequences))
    sizes = [len(g.tiles) * g.height * g.width for g in group(cut(rows.segments, None), None)]
    width = DTYPES[setting.dtype].itemsize
    return int(config.num_attention_heads) * width * (sum(sizes) + SCORES * max(sizes))


def kept_of_layer(setting: Setting, outline: PreTrainedModel) -> int:
    """Return the bytes that a layer keeps for each token.

    The results of two norms; queries, keys and values; the two inputs of the gate. The input of a projection
    only where its weight is trained or adapted: those of q, k, v, gate and up are the norms' results. A norm
    that is trained keeps what it has scaled too.
    """
    config, request = outline.config.get_text_config(), setting.spec.request
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)  # GPT-2's
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    queries, keys = heads * head, int(getattr(config, "num_key_value_heads", None) or heads) * head
    values = 2 * hidden + queries + 2 * keys + 2 * inner
    width, adapters = DTYPES[setting.dtype].itemsize, request.adapters
    if adapters is None:
        values += 2 * hidden + queries + inner
        return values * width + _rounded_inputs(setting, hidden, queries, inner)
    values += (
        queries * bool(OUTPUT_NAMES & set(adapters.lora_attn_modules)) + inner * adapters.apply_lora_to_mlp
    )
    outputs = 0
    if adapters.use_dora:  # peft's own: three results of each adapted layer in fp32
        adapted = adapted_layers(outline, adapters).values()
        outputs = 3 * sum(out for _, out in adapted) // int(config.num_hidden_layers)
    return values * width + outputs * FP32 + _rounded_inputs(setting, hidden, queries, inner)


def _rounded_inputs(setting: Setting, hidden: int, queries: int, inner: int) -> int:
    """Return the bytes that a layer keeps for each token of the inputs that QAT rounds to 8 bits."""
    algorithm = setting.spec.request.algorithm_config
    if (
        not isinstance(algorithm, QATFinetuningConfig)
        or algorithm.quantizer_name is Quantizer.int4_weight_only
    ):
        return 0
    width = DTYPES[setting.dtype].itemsize
    return (5 * hidden + queries + inner) * width + 3 * hidden * FP32  # of the products, and before


def _copies_of_weights(setting: Setting, outline: PreTrainedModel) -> int:
    """Return the bytes of what a step makes of fp32 weights: autocast's copies, and QAT's rounded ones."""
    if setting.algorithm.weights.frozen_base:
        return 0
    config, request = outline.config.get_text_config(), setting.spec.request
    head, width = int(config.vocab_size * config.hidden_size), DTYPES[setting.dtype].itemsize
    copies = head * FP32 * (request.adapters is None)  # its gradient is summed apart
    if width < FP32:
        copies += (outline.num_parameters() + head) * width
    if isinstance(request.algorithm_config, QATFinetuningConfig):
        rounded = sum(layer.weight.numel() for layer in linear_layers(outline).values())
        copies += rounded * FP32 * (request.adapters is None) + rounded * FP32 * (width == FP32)
    return copies
