"""Activations in host memory between forward and backward pass."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

RECENT = 8
"""Tensors that are looked at for whether they are kept already: a layer's functions may share one."""


def offloaded(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep what the backward pass needs in host memory, but for the model's weights, which stay anyway.

    :func:`torch.autograd.graph.save_on_cpu` would copy the weights too, in every micro-batch.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    recent: deque[tuple[Tensor, int, Tensor]] = deque(maxlen=RECENT)  # held, so that no other takes its place

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor.device, tensor
        for source, version, host in recent:
            if _is_same(source, tensor) and version == tensor._version:
                return tensor.device, host
        pinned = tensor.device.type == "cuda"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        recent.append((tensor.detach(), tensor._version, host.copy_(tensor)))
        return tensor.device, host

    def unpack(kept: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = kept
        return tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and (one.shape, one.stride(), one.dtype) == (
        other.shape,
        other.stride(),
        other.dtype,
    )
