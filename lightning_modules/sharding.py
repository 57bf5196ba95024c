"""Weights that are divided among devices, each of which gathers a layer while it computes it: FSDP2.

Reference: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html . Lightning's strategy for
it is :class:`lightning.pytorch.strategies.ModelParallelStrategy`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_modules import sharded_state
from lightning_modules.objective import RUN, SCORE, language_model, run_and_score, run_head
from lightning_modules.process_group import keep_alive
from lightning_modules.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh, *, apart: bool, offload: bool) -> None:
    """Divide a model's weights among the devices, in place; layer by layer they are gathered for use.

    What is in no layer, embedding and head above all, is gathered for a whole pass through the model.

    :param mesh: one dimension.
    :param apart: gather embedding and head only while they are used: ``memory_efficient_fsdp_wrap``. An
        embedding that is the head too is gathered for a whole pass in any case, but not between two passes.
    :param offload: keep weights, gradients and the optimizer's state on the host: ``fsdp_cpu_offload``.
    """
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    # The outermost one too: an optimizer that is made after a validation must find the parts.
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": policy, "reshard_after_forward": True}
    transformer = language_model(model)
    for layer in transformer.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            fully_shard(layer, **options)
    for group in _ends(transformer) if apart else []:
        fully_shard(group, **options)
        if isinstance(head := group[-1], nn.Linear):
            setattr(head, SCORE, MethodType(_score, head))
            register_fsdp_forward_method(head, SCORE)
    fully_shard(transformer, **options)
    setattr(transformer, RUN, MethodType(run_and_score, transformer))
    register_fsdp_forward_method(transformer, RUN)


def _ends(transformer: nn.Module) -> list[list[nn.Module]]:
    """Return embedding and head as they can be gathered apart; an adapted head is not."""
    model: Any = transformer
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return [[embedding]]
    tied = head.weight is embedding.weight
    return [[embedding, head]] if tied else [[embedding], [head]]


def _score(head: nn.Linear, *args: Any) -> Tensor:
    """Score by what a divided head has gathered; itself it is no plain linear layer."""
    plain = nn.Linear(1, 1, device="meta")
    plain.weight, plain.bias = head.weight, head.bias
    return run_head(plain, *args)


def whole(value: Tensor) -> Tensor:
    """Return a tensor, gathered where it is divided: in all processes at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@dataclass
class Shell:
    """A model without weights, made before they were divided, to be written with the gathered ones.

    :param first: whether this process writes.
    :param wanted: whether a parameter is written.
    """

    model: nn.Module
    first: bool
    wanted: Callable[[nn.Parameter], bool]

    @classmethod
    def of(cls, model: nn.Module, *, first: bool, wanted: Callable[[nn.Parameter], bool]) -> Shell:
        """Copy a model's modules and not its weights."""
        without: dict[int, Any] = {
            id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
            for weight in model.parameters()
        }
        return cls(copy.deepcopy(model, without), first, wanted)

    @contextmanager
    def filled(self, divided: nn.Module) -> Iterator[nn.Module]:
        """Yield the model with the weights of the divided one; without any where nothing is written."""
        weights: dict[int, nn.Parameter] = {}
        for weight in divided.parameters():
            if self.wanted(weight):
                gathered = gather(weight, keep=self.first)
                if gathered is not None:
                    weights[id(weight)] = nn.Parameter(gathered, weight.requires_grad)
        names = [(name, weights.get(id(w))) for name, w in divided.named_parameters(remove_duplicate=False)]
        before = dict(self.model.named_parameters(remove_duplicate=False))
        self._set({name: weight for name, weight in names if weight is not None})
        try:
            yield self.model
        finally:
            self._set(before)

    def _set(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            place, _, last = name.rpartition(".")
            self.model.get_submodule(place)._parameters[last] = weight


def gather(value: Tensor, *, keep: bool) -> Tensor | None:
    """Gather a tensor in all processes; return it on the host where it is kept."""
    value = value.detach()
    if isinstance(value, DTensor):
        divided = cast(DTensor, value.to(value.device_mesh.device_type))
        value = divided.full_tensor()
    return value.cpu() if keep else None


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose state is one file, of which each process writes and reads its part.

    So a retry may go on with another number of processes, and from the state of one process or of DDP.

    :param ranks: the processes that train.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        super().__init__(data_parallel_size=ranks.world, tensor_parallel_size=1, timeout=timeout)
        self._ranks = ranks

    def setup_environment(self) -> None:
        """Make the groups of processes, with connections of their own."""
        super().setup_environment()
        keep_alive()

    def model_to_device(self) -> None:
        """Do nothing: dividing has put everything where it belongs, offloaded weights on the host."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this process's parts of the trained weights."""
        return {name: w.detach() for name, w in self._module.named_parameters() if w.requires_grad}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the optimizer keeps of each weight, this process's parts."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = inner.state_dict()
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Write the state, each process its parts.

        :raises OSError: as :func:`lightning_modules.sharded_state.write`.
        """
        sharded_state.write(checkpoint, Path(filepath), self._ranks)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Take this process's parts of weights and optimizer; return the state."""
        file = Path(checkpoint_path)
        of_optimizers = [
            [weight for group in optimizer.param_groups for weight in group["params"]]
            for optimizer in self.optimizers
        ]
        if sharded_state.is_sharded(file):
            named = dict(self._module.named_parameters())
            checkpoint: dict[str, Any] = sharded_state.read_divided(file, named, of_optimizers, self._ranks)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                optimizer.load_state_dict(state)
            return checkpoint
        checkpoint = torch.load(file, mmap=True, map_location="cpu", weights_only=True)
        for name, weight in self._module.named_parameters():
            if name in checkpoint["state_dict"]:
                with torch.no_grad():
                    weight.copy_(_part(checkpoint["state_dict"][name], weight))
        states = checkpoint["optimizer_states"]
        for optimizer, state, weights in zip(self.optimizers, states, of_optimizers, strict=True):
            parts = {
                number: {key: _part(value, weights[number]) for key, value in of.items()}
                for number, of in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": parts})
        return checkpoint

    @property
    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)


def _part(value: Any, weight: Tensor) -> Any:
    """Return this process's part of what belongs to a divided weight; a count of steps belongs to all."""
    if not isinstance(weight, DTensor) or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    local = value.to(weight.device_mesh.device_type)
    part = distribute_tensor(local, weight.device_mesh, weight.placements, src_data_rank=None)
    return part.to(weight.device)
