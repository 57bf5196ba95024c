"""Algorithm type -> how its model is made ready for training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_modules.adapters import add_adapters
from post_training.errors import ModelError
from post_training.schemas.algorithms import AlgorithmConfig


@dataclass(frozen=True)
class Algorithm:
    """What differs between the fine-tuning algorithms.

    :param prepare: takes the loaded base model, the algorithm's config and the base model's name;
        returns the model with exactly the trained parameters requiring gradients.
    :param learning_rate: peak rate where the request has no optimizer_config.
    :param frozen_base: whether the base stays as it was loaded and is held in the job's dtype;
        otherwise its fp32 weights are trained under autocast.
    """

    prepare: Callable[[PreTrainedModel, Any, str], nn.Module]
    learning_rate: float
    frozen_base: bool


def _train_everything(model: PreTrainedModel, config: None, base_model: str) -> nn.Module:
    return model.requires_grad_(True)


ALGORITHMS: Mapping[str, Algorithm] = {
    "full": Algorithm(_train_everything, learning_rate=2e-5, frozen_base=False),
    "LoRA": Algorithm(add_adapters, learning_rate=2e-4, frozen_base=True),
}
"""Every algorithm by its ``type``; ``full`` is the request without an algorithm_config."""


def find_algorithm(config: AlgorithmConfig | None) -> Algorithm:
    """Return the algorithm of a request.

    :raises ModelError: if this version cannot train it.
    """
    name = "full" if config is None else config.type
    if name not in ALGORITHMS:
        raise ModelError(f"the algorithm {name} is not available: use one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
