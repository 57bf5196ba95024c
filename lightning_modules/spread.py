"""How a job spreads over its devices: Lightning's strategy, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_modules.process_group import TIMEOUT
from lightning_modules.setting import Setting
from lightning_modules.sharding import ShardedStrategy, Shell, shard


@dataclass(frozen=True)
class Spread:
    """What one process of a job needs to train together with the others.

    :param shard: divides the weights among the devices; None leaves each a whole model.
    :param whole: gives the first process the model to export, in all of them.
    """

    strategy: Strategy | Literal["auto"] = "auto"
    shard: Callable[[nn.Module, DeviceMesh], None] | None = None
    whole: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext

    @classmethod
    def of(cls, setting: Setting, model: nn.Module) -> Spread:
        """Choose for a job, before anything of its model is divided."""
        ranks, efficiency = setting.ranks, setting.efficiency
        if ranks.world == 1:
            return cls()
        if not setting.sharded:
            return cls(_whole_models(setting))
        runtime = setting.spec.request.runtime
        adapter_alone = isinstance(model, PeftModel) and (runtime is None or runtime.export != "merged")
        shell = Shell.of(
            model, first=ranks.first, wanted=lambda weight: weight.requires_grad or not adapter_alone
        )
        divide = partial(
            shard,
            apart=bool(efficiency.memory_efficient_fsdp_wrap),
            offload=bool(efficiency.fsdp_cpu_offload),
        )
        return cls(ShardedStrategy(ranks, TIMEOUT), divide, shell.filled)


def _whole_models(setting: Setting) -> DDPStrategy:
    """Return the strategy that leaves each device a whole model: Ray's own, where Ray gives the devices."""
    options: dict[str, Any] = {
        "timeout": TIMEOUT,
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
    }
    if not setting.on_ray:
        return DDPStrategy(**options)
    from ray.train.lightning import RayDDPStrategy  # noqa: PLC0415 - where it is installed, and takes seconds

    return cast(DDPStrategy, RayDDPStrategy(**options))  # type: ignore[no-untyped-call]


def environment(setting: Setting) -> list[ClusterEnvironment]:
    """Return what tells Lightning its place among the processes; nothing where torchrun's variables do."""
    if not setting.on_ray:
        return []
    from lightning_modules.ray_environment import PlacedEnvironment  # noqa: PLC0415 - as above

    return [PlacedEnvironment(setting.ranks)]
