"""A job's settings with their defaults filled in, and what the user is told of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch

from lightning_modules.data.share import Share
from lightning_modules.models import effective_dtype
from lightning_modules.ranks import ALONE, Ranks
from lightning_modules.registry import Algorithm, find_algorithm
from post_training.errors import HardwareError
from post_training.schemas.record import TAG_WARNING
from post_training.schemas.requests import PreferenceOptimizeRequest
from post_training.schemas.trainer import TrainerSpec
from post_training.schemas.training import DataConfig, EfficiencyConfig, LoggerConfig, RuntimeConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

OFF_A_GPU = {"enable_activation_offloading": "activations", "fsdp_cpu_offload": "weights"}
"""Flags that mean nothing on a CPU, and what they move."""


@dataclass
class Notices:
    """What the user should know and did not ask: logged, and kept on the job's record."""

    record: JobRecord
    texts: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Log a warning and put all warnings so far on the record."""
        log.warning(text)
        self.texts.append(text)
        self.record.set_tag(TAG_WARNING, "; ".join(self.texts))


@dataclass(frozen=True)
class Setting:
    """A spec's parts with their defaults filled in, and the device that trains.

    :param ranks: the processes that train it, a device each.
    """

    spec: TrainerSpec
    data: DataConfig
    runtime: RuntimeConfig
    efficiency: EfficiencyConfig
    logger: LoggerConfig
    algorithm: Algorithm
    device: Literal["cpu", "cuda"]
    dtype: str
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, spec: TrainerSpec, ranks: Ranks = ALONE) -> Setting:
        """Check what can be known before data and weights are read.

        :raises HardwareError: if the machine cannot do what the request asks.
        """
        request, training = spec.request, spec.request.training_config
        efficiency = training.efficiency_config or EfficiencyConfig()
        device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
        for flag, what in OFF_A_GPU.items():
            if getattr(efficiency, flag) and device == "cpu":
                raise HardwareError(f"{flag} moves {what} off a GPU: this machine has none")
        return cls(
            spec=spec,
            data=cast(DataConfig, training.data_config),  # the request was validated
            runtime=request.runtime or RuntimeConfig(),
            efficiency=efficiency,
            logger=request.logger,
            algorithm=find_algorithm(request),
            device=device,
            dtype=effective_dtype(training.dtype, device),
            ranks=ranks,
        )

    @property
    def share(self) -> Share:
        """What of each batch this process takes."""
        devices = self.runtime.devices * self.runtime.num_nodes
        return Share(devices, self.ranks.rank, self.ranks.world)

    @property
    def sharded(self) -> bool:
        """Whether each device holds a part of the weights only (FSDP)."""
        return self.runtime.strategy == "fsdp" and self.ranks.world > 1

    @property
    def on_ray(self) -> bool:
        """Whether Ray Train has started the processes."""
        return self.spec.request.on_ray

    @property
    def reference_once(self) -> bool:
        """Whether a reference's log-probabilities are computed before training and kept."""
        preference = isinstance(self.spec.request, PreferenceOptimizeRequest)
        return preference and self.runtime.reference_logprobs != "live"

    @property
    def precision(self) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
        """Lightning's name: a frozen base in bf16 needs no autocast, fp16 needs a gradient scaler."""
        if self.dtype == "fp16":
            return "16-mixed"
        return "bf16-mixed" if self.dtype == "bf16" and not self.algorithm.weights.frozen_base else "32-true"
