"""Activations in host memory between forward and backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn


def offloaded(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep what the backward pass needs in host memory, but for the model's weights, which stay anyway.

    :func:`torch.autograd.graph.save_on_cpu` would copy the weights too, in every micro-batch.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return tensor.device, host.copy_(tensor)

    def unpack(kept: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = kept
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
