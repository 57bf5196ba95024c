"""The bodies of the two training methods, and how their errors are told."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from post_training.errors import ErrorDetail
from post_training.schemas.algorithms import AlgorithmConfig, DPOAlignmentConfig, LoraFinetuningConfig
from post_training.schemas.base import StrictModel, check_text, parse_json_object
from post_training.schemas.rules import RULES, check
from post_training.schemas.search import SPACE_TYPES, SearchConfig, search_schema
from post_training.schemas.search_rules import SEARCH_RULES
from post_training.schemas.training import NULL_IS_SAID, LoggerConfig, RuntimeConfig, TrainingConfig

MAX_JOB_UUID_LENGTH = 200
MAX_MESSAGE_LENGTH = 400
"""Characters of pydantic's message: that of a union's tag quotes the whole value."""

_SAID = ("job_uuid", "unsupported", "search")
_OF_OBJECTS = ("json_invalid", "string_unicode", "dict_type", "model_type", "model_attributes_type")
_NOT_QUOTED = ("extra_forbidden", "missing", *_SAID, *_OF_OBJECTS)
"""Types of errors whose value is not repeated: there is none, the message has it, or it may be a secret."""

_JOB_UUID = re.compile(r"[A-Za-z0-9_.~:+-]+")
_RESERVED_PREFIXES = ("scheduled__", "backfill__", "asset_triggered__")


def check_job_uuid(value: str) -> str:
    """Return the id if Airflow can carry it as a run id and file systems as a name.

    :raises PydanticCustomError: naming the rule that is broken.
    """

    def broken(rule: str) -> PydanticCustomError:
        return PydanticCustomError(
            "job_uuid", "job_uuid {rule}, got {value}", {"rule": rule, "value": repr(value[:80])}
        )

    if not value or len(value) > MAX_JOB_UUID_LENGTH:
        raise broken(f"must have 1 to {MAX_JOB_UUID_LENGTH} characters")
    if not _JOB_UUID.fullmatch(value):
        raise broken("may hold only letters, digits and _ . ~ : + -")
    if ".." in value or value == ".":
        raise broken("must be no '.' and hold no '..'")
    if value.startswith(_RESERVED_PREFIXES):
        raise broken(f"must not start with {', '.join(_RESERVED_PREFIXES)}: Airflow names its own runs so")
    return value


LENIENT = {"lenient": True}
"""Validation context of what templates rendered: a validation inside another does not know its strictness."""


_RENDERED_FLAGS = {"true": True, "false": False}
"""A literal, unlike a bool, is not read from text by itself."""


def _check_logger_config(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Return the config without its defaults, so that one meaning has one spelling."""
    lenient = info.context == LENIENT
    if lenient and isinstance(value.get("log_model"), str):
        value = {**value, "log_model": _RENDERED_FLAGS.get(value["log_model"].lower(), value["log_model"])}
    config = LoggerConfig.model_validate(value, strict=False if lenient else None)
    return config.model_dump(mode="json", exclude_defaults=True)


def _without_nulls(runtime: RuntimeConfig | None) -> RuntimeConfig | None:
    """Read null as unset, so that one meaning has one spelling; but null adapters are no adapters."""
    if runtime is None:
        return None
    said = {
        name
        for name in runtime.model_fields_set
        if getattr(runtime, name) is not None or name in NULL_IS_SAID
    }
    return RuntimeConfig.model_construct(said, **dict(runtime)) if said else None


def _check_search_config(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Return the config without its defaults; {} is no search."""
    if not value:
        return value
    config = SearchConfig.model_validate(value, strict=False if info.context == LENIENT else None)
    return config.model_dump(mode="json", exclude_defaults=True)


JobUuid = Annotated[
    str,
    AfterValidator(check_job_uuid),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_JOB_UUID_LENGTH,
            "pattern": rf"^(?!\.$|.*\.\.|{'|'.join(_RESERVED_PREFIXES)}){_JOB_UUID.pattern}$",
        }
    ),
]
JsonTrainingConfig = Annotated[
    TrainingConfig, BeforeValidator(parse_json_object, json_schema_input_type=TrainingConfig | str)
]
LoggerConfigDict = Annotated[
    dict[str, Any],
    BeforeValidator(parse_json_object),
    AfterValidator(_check_logger_config),
    WithJsonSchema(
        LoggerConfig.model_json_schema() | {"type": ["object", "string"], "description": LoggerConfig.__doc__}
    ),
]
SearchConfigDict = Annotated[
    dict[str, Any],
    BeforeValidator(parse_json_object),
    AfterValidator(_check_search_config),
    WithJsonSchema(search_schema()),
]
JsonRuntime = Annotated[
    RuntimeConfig | None,
    BeforeValidator(parse_json_object, json_schema_input_type=RuntimeConfig | str | None),
    AfterValidator(_without_nulls),
]
JsonDPOConfig = Annotated[
    DPOAlignmentConfig,
    BeforeValidator(parse_json_object, json_schema_input_type=DPOAlignmentConfig | str),
]


class JobRequest(StrictModel):
    """What every body that starts a job has."""

    job_uuid: JobUuid = Field(description="The job's id, chosen by the client; also its Airflow run id.")
    training_config: JsonTrainingConfig = Field(description="The training loop and its data.")
    hyperparam_search_config: SearchConfigDict = Field(
        description="A search, {} is none. space: a field of this request by its dotted path -> {type:"
        " float or int, low, high} or {type: categorical, choices}; n_trials; further metric, direction,"
        " sampler, pruner, timeout_seconds, max_parallel, seed, use.",
    )
    logger_config: LoggerConfigDict = Field(
        description="MLflow's names and intervals, {} takes the defaults: experiment_name, run_name, tags,"
        " log_every_n_steps (optimizer steps; 1), log_model (all checkpoints; true: the last; false: none),"
        " sample_prompts (answered at each validation), log_figures (pictures at the end; true)."
    )
    runtime: JsonRuntime = Field(
        default=None,
        description="Where and within which limits it runs; null takes the deployment's defaults.",
    )

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        return check_text(value)

    @property
    def logger(self) -> LoggerConfig:
        """The validated ``logger_config``."""
        return LoggerConfig.model_validate(self.logger_config)

    @property
    def search(self) -> SearchConfig | None:
        """The validated ``hyperparam_search_config``, None without a search."""
        config = self.hyperparam_search_config
        return SearchConfig.model_validate(config) if config else None


class TrainingRequest(JobRequest):
    """What both training methods share."""

    method: ClassVar[Literal["supervised_fine_tune", "preference_optimize"]]
    """Name of the method, of its DAG and of its trainer."""

    _places: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingRequest:
        check(self, (*RULES[self.method], *SEARCH_RULES))
        return self

    @property
    def adapters(self) -> LoraFinetuningConfig | None:
        """The adapters that the job trains; None where it trains every weight."""
        return self.runtime.adapter if self.runtime is not None else None

    @property
    def devices(self) -> int:
        """Devices that the job takes on each node."""
        return self.runtime.devices if self.runtime is not None else 1

    @property
    def on_ray(self) -> bool:
        """Whether the job trains on nodes of a Ray cluster."""
        return self.runtime is not None and self.runtime.launcher == "ray"

    def place_of(self, field: str) -> str:
        """Return where the caller's body has a field, given by its dotted path in this form of it."""
        return self._places.get(field, field)

    def payload_hash(self) -> str:
        """SHA-256 of the request's canonical JSON, defaults filled in, as hexadecimal digits."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class SupervisedFineTuneRequest(TrainingRequest):
    """Body of ``supervised-fine-tune``: train on given answers."""

    method: ClassVar[Literal["supervised_fine_tune"]] = "supervised_fine_tune"

    model: str | None = Field(
        default=None,
        min_length=1,
        description="Base model: a hub id, a folder or .gguf file under an allowed root, or an MLflow URI;"
        " null is the deployment's default model.",
    )
    checkpoint_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder under an allowed root that receives a copy of each checkpoint; null keeps them in"
        " MLflow alone.",
    )
    algorithm_config: Annotated[
        AlgorithmConfig | None,
        BeforeValidator(parse_json_object, json_schema_input_type=AlgorithmConfig | str | None),
    ] = Field(default=None, description="LoRA or QAT; null trains every weight.")

    @property
    def adapters(self) -> LoraFinetuningConfig | None:
        """The adapters that the job trains; None where it trains every weight."""
        if isinstance(self.algorithm_config, LoraFinetuningConfig):
            return self.algorithm_config
        return super().adapters


class PreferenceOptimizeRequest(TrainingRequest):
    """Body of ``preference-optimize``: train on chosen and rejected answers."""

    method: ClassVar[Literal["preference_optimize"]] = "preference_optimize"

    finetuned_model: str = Field(
        min_length=1,
        description="Model to start from: a hub id, a folder or .gguf file under an allowed root, or an"
        " MLflow URI, of a checkpoint too.",
    )
    algorithm_config: JsonDPOConfig = Field(description="Parameters of the preference loss.")


AnyTrainingRequest = SupervisedFineTuneRequest | PreferenceOptimizeRequest
REQUESTS: dict[str, type[SupervisedFineTuneRequest] | type[PreferenceOptimizeRequest]] = {
    request.method: request for request in (SupervisedFineTuneRequest, PreferenceOptimizeRequest)
}
"""Request class of each training method."""


def error_details(errors: Iterable[Mapping[str, Any]]) -> list[ErrorDetail]:
    """Reduce pydantic's errors to the field's path, the rule with the value, and the rule's type.

    :param errors: of ``ValidationError.errors()``, or of FastAPI's own error, whose paths start at ``body``.
    """
    return [
        {
            "loc": _field_path(e["loc"]),
            "msg": e["msg"][:MAX_MESSAGE_LENGTH] + _offending_value(e),
            "type": e["type"],
        }
        for e in errors
    ]


def _field_path(loc: Sequence[int | str]) -> list[int | str]:
    """Leave out what is no field: the place that FastAPI puts first and the tags of unions."""
    parts = list(loc[1:] if loc[:1] in (("body",), ("query",), ("path",)) else loc)
    if parts[:1] == ["algorithm_config"] and parts[1:2] in (["LoRA"], ["QAT"]):
        del parts[1]
    if parts[:2] == ["hyperparam_search_config", "space"] and parts[3:4] in [[kind] for kind in SPACE_TYPES]:
        del parts[3]
    return parts


def _offending_value(error: Mapping[str, Any]) -> str:
    """Quote a short scalar; never what may hold a secret: an unknown field, text where an object belongs."""
    value = error["input"]
    if error["type"] in _NOT_QUOTED:
        return ""
    if isinstance(value, str | int | float | bool):
        return f", got {repr(value)[:80]}"
    return ""
