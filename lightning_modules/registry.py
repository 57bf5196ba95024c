"""Method and algorithm of a request -> how it is trained and exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lightning_modules.adapters import add_adapters, target_modules
from lightning_modules.data.formats import FORMATS, PREFERENCE_FORMATS, Turn
from lightning_modules.data.shards import Conversations
from lightning_modules.data.tokenize import Item, Pair
from lightning_modules.merge import export_merged
from lightning_modules.models import save_model
from lightning_modules.nf4 import quantizable, quantize_base
from lightning_modules.objective import Objective
from lightning_modules.preference import PreferenceOptimization, notices
from lightning_modules.ranks import Ranks
from lightning_modules.supervised import SupervisedFineTuning
from post_training.schemas.algorithms import LoraFinetuningConfig, QATFinetuningConfig
from post_training.schemas.requests import (
    AnyTrainingRequest,
    PreferenceOptimizeRequest,
    SupervisedFineTuneRequest,
)


@dataclass(frozen=True)
class Weights:
    """Which of a model's weights are trained, and in what form they leave.

    :param title: what is trained, in words.
    :param check: takes the model without weights (on the meta device) and raises ModelError if it cannot
        be trained so.
    :param prepare: takes the loaded base model and the base model's name; returns the model with exactly
        the trained parameters requiring gradients.
    :param export: writes what was trained into a folder, and leaves the model as it was.
    :param learning_rate: peak rate where the request has no optimizer_config.
    :param frozen_base: whether the base stays as it was loaded and is held in the job's dtype;
        otherwise its fp32 weights are trained under autocast.
    """

    title: str
    check: Callable[[PreTrainedModel, AnyTrainingRequest], None]
    prepare: Callable[[PreTrainedModel, AnyTrainingRequest, str], nn.Module]
    export: Callable[[AnyTrainingRequest, nn.Module, Path], None]
    learning_rate: float
    frozen_base: bool


@dataclass(frozen=True)
class Method:
    """What is learned from a row.

    :param title: what that is called.
    :param conversations: data_format -> reader of a row's conversations.
    :param item: a row's tokenized conversations -> what a batch is made of.
    :param objective: makes the loss of a request, for the processes that train it.
    :param notices: what the author of a request may not expect of its objective, in sentences.
    :param learning_rate: peak rate where the request has no optimizer_config; None is the weights' own.
    """

    title: str
    conversations: Mapping[str, Conversations]
    item: Callable[..., Item]
    objective: Callable[[Any, Ranks], Objective]
    notices: Callable[[Any], Iterable[str]] = lambda request: ()
    learning_rate: float | None = None


@dataclass(frozen=True)
class Algorithm:
    """How a request is trained."""

    method: Method
    weights: Weights

    @property
    def learning_rate(self) -> float:
        """Peak rate where the request has no optimizer_config."""
        return self.method.learning_rate or self.weights.learning_rate


def _adapters(request: AnyTrainingRequest) -> LoraFinetuningConfig:
    assert request.adapters is not None, "a job that trains adapters has their config"  # noqa: S101
    return request.adapters


def _quantization(request: AnyTrainingRequest) -> QATFinetuningConfig:
    return cast(QATFinetuningConfig, request.algorithm_config)


def _check_adapters(model: PreTrainedModel, request: AnyTrainingRequest) -> None:
    config = _adapters(request)
    target_modules(model, config)
    if config.quantize_base:
        quantizable(model)


def _check_quantization(model: PreTrainedModel, request: AnyTrainingRequest) -> None:
    from lightning_modules.quantization import check_group_size  # noqa: PLC0415 - torchao: a second

    check_group_size(model, _quantization(request))
    if request.adapters is not None:
        target_modules(model, request.adapters)


def _train_everything(model: PreTrainedModel, request: AnyTrainingRequest, base_model: str) -> nn.Module:
    return model.requires_grad_(True)


def _train_adapters(model: PreTrainedModel, request: AnyTrainingRequest, base_model: str) -> nn.Module:
    config = _adapters(request)
    if config.quantize_base:
        quantize_base(model, model.dtype)
    return add_adapters(model, config, base_model)


def _train_quantized(model: PreTrainedModel, request: AnyTrainingRequest, base_model: str) -> nn.Module:
    from lightning_modules.quantization import prepare  # noqa: PLC0415 - as above

    prepare(model, _quantization(request), request.adapters)
    return model


def _export_whole(request: AnyTrainingRequest, model: nn.Module, folder: Path) -> None:
    save_model(cast(PreTrainedModel, model), folder)


def _export_adapters(request: AnyTrainingRequest, model: nn.Module, folder: Path) -> None:
    adapted = cast(PeftModel, model)
    if request.runtime is not None and request.runtime.export == "merged":
        export_merged(adapted, folder)
        return
    # "auto" would ask the hub whether the base model's vocabulary was resized.
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def _export_quantized(request: AnyTrainingRequest, model: nn.Module, folder: Path) -> None:
    from lightning_modules.quantization import quantized_copy  # noqa: PLC0415 - as above

    save_model(quantized_copy(cast(PreTrainedModel, model), _quantization(request)), folder)


def _alone(read: Callable[[Mapping[str, Any]], list[Turn]]) -> Conversations:
    """Make the reader of a row that holds one conversation."""
    return lambda row: [read(row)]


_QUANTIZED = Weights(
    "every weight, as it will be once it is quantized (QAT)",
    _check_quantization,
    _train_quantized,
    _export_quantized,
    learning_rate=2e-5,
    frozen_base=False,
)

WEIGHTS: Mapping[str, Weights] = {
    "full": Weights(
        "every weight",
        lambda model, request: None,
        _train_everything,
        _export_whole,
        learning_rate=2e-5,
        frozen_base=False,
    ),
    "LoRA": Weights(
        "low-rank adapters (LoRA)",
        _check_adapters,
        _train_adapters,
        _export_adapters,
        learning_rate=2e-4,
        frozen_base=True,
    ),
    "QAT": _QUANTIZED,
    "QAT with LoRA": replace(
        _QUANTIZED,
        title="low-rank updates of weights, as these will be once they are quantized (QAT)",
        learning_rate=2e-4,
    ),
}
"""Every way to train weights; ``full`` is the request without an algorithm or adapters."""

METHODS: Mapping[str, Method] = {
    SupervisedFineTuneRequest.method: Method(
        "supervised fine-tuning",
        conversations={name: _alone(read) for name, read in FORMATS.items()},
        item=lambda example: example,
        objective=lambda request, ranks: SupervisedFineTuning(),
    ),
    PreferenceOptimizeRequest.method: Method(
        "direct preference optimization",
        conversations=PREFERENCE_FORMATS,
        item=Pair,
        objective=lambda request, ranks: PreferenceOptimization(request.algorithm_config, ranks),
        notices=notices,
        learning_rate=5e-6,
    ),
}
"""What each training method learns."""


def find_algorithm(request: AnyTrainingRequest) -> Algorithm:
    """Return how a request is trained."""
    names = ["QAT"] * isinstance(request.algorithm_config, QATFinetuningConfig)
    names += ["LoRA"] * (request.adapters is not None)
    return Algorithm(METHODS[request.method], WEIGHTS[" with ".join(names) or "full"])
