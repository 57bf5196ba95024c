"""Rules between fields: each value is valid by itself, and beside the others it means nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from post_training.errors import ErrorDetail
from post_training.schemas.algorithms import QATFinetuningConfig

if TYPE_CHECKING:
    from post_training.schemas.requests import (
        AnyTrainingRequest,
        PreferenceOptimizeRequest,
        SupervisedFineTuneRequest,
        TrainingRequest,
    )


class Broken(NamedTuple):
    """A broken rule.

    :param field: dotted path of the field that is to change.
    :param rule: what holds for it; the value is put behind it.
    :param kind: the rule's type, as pydantic names them.
    """

    field: str
    rule: str
    kind: str = "value_error"


def check(request: BaseModel, rules: Iterable[Callable[[Any], Iterator[Broken]]]) -> None:
    """Hold a request against rules.

    :raises ValidationError: with one entry for each broken rule.
    """
    broken = [problem for rule in rules for problem in rule(request)]
    if broken:
        raise ValidationError.from_exception_data(
            type(request).__name__,
            [
                {
                    "type": PydanticCustomError(problem.kind, problem.rule),
                    "loc": tuple(problem.field.split(".")),
                    "input": _at(request, problem.field),
                }
                for problem in broken
            ],
        )


def _at(request: Any, path: str) -> Any:
    """Return the value of a dotted path, None where a part of it is absent."""
    for name in path.split("."):
        request = request.get(name) if isinstance(request, dict) else getattr(request, name, None)
    return request


def has_data(request: TrainingRequest) -> Iterator[Broken]:
    """The published schema lets ``data_config`` be absent; nothing can be trained without."""
    if request.training_config.data_config is None:
        yield Broken(
            "training_config.data_config", "Field required: it names the data set to train on", "missing"
        )


def answers_at_validations(request: TrainingRequest) -> Iterator[Broken]:
    """Sample prompts are answered when the model is validated."""
    if request.logger.sample_prompts and request.training_config.max_validation_steps == 0:
        yield Broken(
            "logger_config.sample_prompts",
            "are answered at each validation: there is none, training_config.max_validation_steps is 0",
        )


def exports_what_it_trains(request: AnyTrainingRequest) -> Iterator[Broken]:
    """``export`` chooses between two forms of a LoRA checkpoint."""
    if request.runtime is None or request.runtime.export is None:
        return
    if isinstance(request.algorithm_config, QATFinetuningConfig):
        yield Broken("runtime.export", "is a form of LoRA checkpoints: a QAT job exports the quantized model")
    elif request.adapters is None:
        yield Broken("runtime.export", "is a form of LoRA adapters, and this job trains none")


def names_adapters_once(request: SupervisedFineTuneRequest) -> Iterator[Broken]:
    """A fine-tuning job's adapters are its ``algorithm_config``; only QAT leaves no place for them there."""
    if request.runtime is None or request.runtime.adapter is None:
        return
    algorithm = request.algorithm_config
    if not isinstance(algorithm, QATFinetuningConfig):
        name = "null" if algorithm is None else algorithm.type
        yield Broken(
            "runtime.adapter",
            "is for preference and QAT jobs: adapters of this one belong into algorithm_config,"
            f" which is {name}",
        )


def quantizes_plain_adapters(request: SupervisedFineTuneRequest) -> Iterator[Broken]:
    """QAT fake-quantizes ``W + (alpha / rank) · B·A``: no magnitude, and a base that is not quantized yet."""
    runtime = request.runtime
    if runtime is None or runtime.adapter is None:
        return
    if not isinstance(request.algorithm_config, QATFinetuningConfig):
        return
    for name in ("use_dora", "quantize_base"):
        if getattr(runtime.adapter, name):
            yield Broken(
                f"runtime.adapter.{name}", "must be false: a QAT job quantizes base and update together"
            )


def has_no_reference(request: SupervisedFineTuneRequest) -> Iterator[Broken]:
    """Only preference optimization compares with a reference model."""
    if request.runtime is not None and request.runtime.reference_logprobs is not None:
        yield Broken(
            "runtime.reference_logprobs", "is for preference jobs: a fine-tuning job has no reference"
        )


def keeps_copies_at_least(request: SupervisedFineTuneRequest) -> Iterator[Broken]:
    """Checkpoints reach MLflow, a folder, or both."""
    if request.logger.log_model is False and request.checkpoint_dir is None:
        yield Broken(
            "logger_config.log_model", "needs a checkpoint_dir: else nothing of the training would be kept"
        )


def keeps_models(request: PreferenceOptimizeRequest) -> Iterator[Broken]:
    """A preference request has no ``checkpoint_dir``."""
    if request.logger.log_model is False:
        yield Broken(
            "logger_config.log_model",
            'must be "all" or true: a preference job has no checkpoint_dir, so nothing of it would be kept',
        )


def compares_answers_alone(request: PreferenceOptimizeRequest) -> Iterator[Broken]:
    """The prompt's log-ratio is the same in both rewards."""
    data = request.training_config.data_config
    if data is not None and data.train_on_input:
        yield Broken(
            "training_config.data_config.train_on_input",
            "must be false: the prompt is the same for both answers and cancels out of their comparison",
        )


def has_a_live_reference(request: PreferenceOptimizeRequest) -> Iterator[Broken]:
    """The live reference is the trained model without its adapters."""
    runtime = request.runtime
    if runtime is not None and runtime.reference_logprobs == "live" and runtime.adapter is None:
        yield Broken(
            "runtime.reference_logprobs", "needs runtime.adapter: the live reference is the model without it"
        )


def spreads_over_devices(request: AnyTrainingRequest) -> Iterator[Broken]:
    """A strategy is for several devices, and what divides weights cannot divide all of them."""
    runtime, training = request.runtime, request.training_config
    if runtime is None or runtime.strategy == "auto":
        return
    if runtime.devices * runtime.num_nodes == 1:
        yield Broken("runtime.strategy", "must be auto on one device: it is how a job spreads over several")
    elif runtime.strategy == "fsdp":
        efficiency = training.efficiency_config
        obstacles = {
            "quantize_base: 4-bit weights cannot be divided": (
                request.adapters is not None and request.adapters.quantize_base
            ),
            "dtype fp16: gradients that are divided are not scaled": training.dtype == "fp16",
            "enable_activation_offloading: it would take gathered weights for activations": (
                efficiency is not None and efficiency.enable_activation_offloading
            ),
        }
        for obstacle, there in obstacles.items():
            if there:
                yield Broken("runtime.strategy", f"must be auto or ddp with {obstacle}")


_OF_BOTH_METHODS = (has_data, answers_at_validations, exports_what_it_trains, spreads_over_devices)

RULES: Mapping[str, tuple[Callable[[Any], Iterator[Broken]], ...]] = {
    "supervised_fine_tune": (
        *_OF_BOTH_METHODS,
        names_adapters_once,
        quantizes_plain_adapters,
        has_no_reference,
        keeps_copies_at_least,
    ),
    "preference_optimize": (
        *_OF_BOTH_METHODS,
        compares_answers_alone,
        has_a_live_reference,
        keeps_models,
    ),
}
"""Rules of each training method; all that are broken are told at once."""


def unsupported(request: AnyTrainingRequest) -> list[ErrorDetail]:
    """List the fields whose value is valid in the schema and means nothing for a job of a deployment."""
    efficiency, runtime = request.training_config.efficiency_config, request.runtime
    problems: list[ErrorDetail] = []
    if efficiency is not None and (runtime is None or runtime.strategy != "fsdp"):
        problems += [
            {
                "loc": ["training_config", "efficiency_config", flag],
                "msg": "must be false: it shards over several devices (FSDP): runtime.strategy fsdp with"
                " runtime.devices above 1, got True",
                "type": "unsupported",
            }
            for flag in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload")
            if getattr(efficiency, flag)
        ]
    if runtime is not None and runtime.num_nodes > 1 and runtime.launcher == "local":
        problems.append(
            {
                "loc": ["runtime", "num_nodes"],
                "msg": "must be 1 with runtime.launcher local, which starts all processes on one node, and"
                f" may be more with ray, got {runtime.num_nodes}",
                "type": "unsupported",
            }
        )
    return problems


OF_A_CLUSTER = frozenset({"launcher", "num_nodes"})
"""Defaults of the runtime block that mean nothing for what trains in a process of its own."""


def unsupported_here(request: AnyTrainingRequest) -> list[ErrorDetail]:
    """List the same for what trains in a process of its own alone: the command line, a search's trials."""
    problems = unsupported(request)
    if request.on_ray:
        problems.append(
            {
                "loc": ["runtime", "launcher"],
                "msg": "must be local for trials and on the command line: only a job's own task submits to a"
                " Ray cluster, got 'ray'",
                "type": "unsupported",
            }
        )
    return problems
