"""Base weights in 4-bit NormalFloat (NF4), frozen under the adapters: QLoRA.

Reference: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs",
https://arxiv.org/abs/2305.14314, section 3.

A weight is held as one of 16 levels, in units of the largest magnitude in its block of 64. Those
magnitudes are quantized too, to 8 bits in blocks of 256 (the paper's double quantization): 4.13 bits a
weight instead of 4.5.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lightning_modules.adapters import linear_layers
from post_training.errors import ModelError

log = logging.getLogger(__name__)

BLOCK = 64
"""Weights that share one scale."""
SCALE_BLOCK = 256
"""Scales that share one scale of their own."""


def quantize_base(model: PreTrainedModel, dtype: torch.dtype, backend: str | None = None) -> None:
    """Replace every linear layer but the output head by one whose weight is held in NF4.

    Embeddings, norms, biases and the head stay as they are. The weights are quantized on the device on
    which they lie.

    The model is not marked as ``is_loaded_in_4bit``, so peft adapts the layers as the linear ones that
    they are. Its class for bitsandbytes rounds the update once more, which bf16 feels, and merges by
    quantizing again; :mod:`lightning_modules.merge` does not.

    :param model: changed in place; the weights are frozen from here on.
    :param dtype: type in which the layers multiply.
    :param backend: a key of :data:`BACKENDS`; None is bitsandbytes, or torchao where it cannot be imported.
    :raises ModelError: if the model has no such layer, or one whose weight is not made of whole blocks.
    """
    layers = quantizable(model)
    backend = backend or preferred_backend()
    before, after = sum(map(_bytes, layers.values())), 0
    for name in list(layers):
        module = BACKENDS[backend](layers.pop(name), dtype)
        model.set_submodule(name, module)
        after += _bytes(module)
    log.info(
        "base weights in 4-bit NF4 by %s: %.1f MiB instead of %.1f", backend, after / 2**20, before / 2**20
    )


def quantizable(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Find the layers that can be held in 4 bits, by name; the model may be on the meta device.

    :raises ModelError: if there are none.
    """
    layers = linear_layers(model)
    if not layers:
        raise ModelError(
            f"quantize_base is refused: this {model.config.model_type} model has no nn.Linear layer besides"
            " its output head (GPT-2's projections are Conv1D), and only those can be held in 4 bits"
        )
    return layers


def is_quantized(module: nn.Module) -> bool:
    """Whether :func:`quantize_base` made this layer."""
    return isinstance(module, NF4Linear) or (
        isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")
    )


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight by which a quantized layer multiplies: (out_features, in_features), a new tensor.

    :param module: a layer for which :func:`is_quantized` holds.
    """
    if isinstance(module, NF4Linear):
        return module.weight
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415

    return dequantize_4bit(module.weight.data, module.weight.quant_state)  # type: ignore[arg-type, union-attr]


def preferred_backend() -> str:
    """Return the faster backend that this machine can import."""
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        log.warning("quantize_base goes through torchao, which is slower: no bitsandbytes (%s)", error)
        return "torchao"
    return "bitsandbytes"


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


def _bitsandbytes_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    if linear.in_features % BLOCK:
        # There its AVX512 kernel multiplies by other blocks' scales (0.50.2, in_features a multiple of 16).
        return NF4Linear(linear, dtype)
    from bitsandbytes.nn.modules import Linear4bit, Params4bit  # noqa: PLC0415

    made = Linear4bit(  # type: ignore[no-untyped-call]
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    weight = Params4bit(
        linear.weight.detach().to(dtype),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    )
    made.weight = weight.to(linear.weight.device)  # type: ignore[misc]  # it quantizes here, once
    made.bias = linear.bias
    # A forward pass in evaluation mode would, on processors with AVX512-BF16, repack the weight for
    # inference and round its scales to bf16, for good: after a validation dequantize_4bit returns
    # scrambled weights, and the layer has no backward pass.
    made.support_avx512bf16_for_cpu = False
    return made.train(linear.training)


class NF4Linear(nn.Linear):
    """A linear layer over a weight in torchao's NF4, which is dequantized in each pass.

    It holds the parts of torchao's tensor, which itself can be neither copied nor broadcast, and which
    peft cannot dequantize.

    :param linear: the layer to quantize; its bias is shared.
    :param dtype: type in which it multiplies.
    :raises ModelError: if its weight is not made of whole blocks.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        from torchao.quantization import to_nf4  # noqa: PLC0415 - a second, in every trainer

        nn.Module.__init__(self)  # nn.Linear's would make a full weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        blocks, rest = divmod(linear.weight.numel(), BLOCK)
        if rest:
            raise ModelError(
                f"quantize_base is refused: NF4 packs blocks of {BLOCK} values, and a weight of"
                f" {self.out_features} x {self.in_features} leaves {rest} over"
            )
        # in fp32: it computes the scales in the weight's own type
        packed = to_nf4(linear.weight.detach().float(), BLOCK, math.gcd(blocks, SCALE_BLOCK))
        names, self.layout = packed.__tensor_flatten__()
        self.packed = nn.ParameterDict(
            {name: nn.Parameter(getattr(packed, name), requires_grad=False) for name in names}
        )
        self.bias = linear.bias
        self.compute_dtype = dtype
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight (out_features, in_features), a new tensor each time."""
        from torchao.quantization import NF4Tensor  # noqa: PLC0415 - as above

        packed = NF4Tensor.__tensor_unflatten__(dict(self.packed), self.layout, None, None)
        weight: Tensor = packed.get_original_weight().to(self.compute_dtype)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Multiply in the compute dtype: (..., in_features) -> (..., out_features), in the input's dtype."""
        product: Tensor = _Frozen.apply(input.to(self.compute_dtype), lambda: self.weight)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            product = product + self.bias.to(self.compute_dtype)
        return product.to(input.dtype)


class _Frozen(torch.autograd.Function):
    """x·Wᵀ that makes W again for the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return x @ weight().T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream @ ctx.weight(), None


BACKENDS: Mapping[str, Callable[[nn.Linear, torch.dtype], nn.Linear]] = {
    "bitsandbytes": _bitsandbytes_linear,
    "torchao": NF4Linear,
}
"""How a linear layer is quantized, by the package that does it."""
