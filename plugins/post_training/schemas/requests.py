"""The bodies of the two training methods, and what an accepted request must not ask for yet."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from post_training.errors import ErrorDetail
from post_training.schemas.algorithms import AlgorithmConfig, DPOAlignmentConfig, RLHFAlgorithm
from post_training.schemas.base import StrictModel, parse_json_object
from post_training.schemas.training import LoggerConfig, OptimizerConfig, RuntimeConfig, TrainingConfig

MAX_JOB_UUID_LENGTH = 200
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


def _check_logger_config(value: dict[str, Any]) -> dict[str, Any]:
    LoggerConfig.model_validate(value)
    return value


def _check_search_config(value: dict[str, Any]) -> dict[str, Any]:
    if value:
        raise PydanticCustomError(
            "unsupported",
            "hyperparameter search is not available in this version: must be empty, got {keys}",
            {"keys": ", ".join(sorted(value))},
        )
    return value


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
    WithJsonSchema({**LoggerConfig.model_json_schema(), "description": LoggerConfig.__doc__}),
]
SearchConfigDict = Annotated[
    dict[str, Any],
    BeforeValidator(parse_json_object),
    AfterValidator(_check_search_config),
    WithJsonSchema({"type": "object", "maxProperties": 0}),
]


class TrainingRequest(StrictModel):
    """What both training methods share."""

    method: ClassVar[Literal["supervised_fine_tune", "preference_optimize"]]
    """Name of the method, of its DAG and of its trainer."""

    job_uuid: JobUuid = Field(description="The job's id, chosen by the client; also its Airflow run id.")
    training_config: JsonTrainingConfig = Field(description="The training loop and its data.")
    hyperparam_search_config: SearchConfigDict = Field(description="Search space and budget; {} is none.")
    logger_config: LoggerConfigDict = Field(
        description="MLflow names and intervals: experiment_name, run_name, tags, log_every_n_steps."
    )
    runtime: Annotated[
        RuntimeConfig | None,
        BeforeValidator(parse_json_object, json_schema_input_type=RuntimeConfig | str | None),
    ] = Field(
        default=None,
        description="Where and within which limits it runs; null takes the deployment's defaults.",
    )

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """Refuse half characters, which JSON can write and neither a database nor a file can hold."""
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except (UnicodeEncodeError, RecursionError, ValueError) as error:
            raise PydanticCustomError(
                "string_unicode", "must be text in valid Unicode: {reason}", {"reason": str(error.args[-1])}
            ) from None
        return value

    @model_validator(mode="after")
    def _has_data(self) -> TrainingRequest:
        if self.training_config.data_config is None:
            missing = PydanticCustomError("missing", "Field required: it names the data set to train on")
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [{"type": missing, "loc": ("training_config", "data_config"), "input": None}],
            )
        return self

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
        description="Base model: a hub id, or a folder or .gguf file under an allowed root;"
        " null is the deployment's default model.",
    )
    checkpoint_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder under an allowed root that receives a copy of each checkpoint.",
    )
    algorithm_config: Annotated[
        AlgorithmConfig | None,
        BeforeValidator(parse_json_object, json_schema_input_type=AlgorithmConfig | str | None),
    ] = Field(default=None, description="LoRA or QAT; null trains every weight.")


class PreferenceOptimizeRequest(TrainingRequest):
    """Body of ``preference-optimize``: train on chosen and rejected answers."""

    method: ClassVar[Literal["preference_optimize"]] = "preference_optimize"

    finetuned_model: str = Field(
        min_length=1,
        description="Model to start from: a hub id, or a folder or .gguf file under an allowed root.",
    )
    algorithm_config: Annotated[
        DPOAlignmentConfig,
        BeforeValidator(parse_json_object, json_schema_input_type=DPOAlignmentConfig | str),
    ] = Field(description="Parameters of the preference loss.")


class URL(StrictModel):
    """A model's address."""

    uri: str = Field(min_length=1)


class PostTrainingRLHFRequest(StrictModel):
    """The published schema's long form of a preference job."""

    job_uuid: JobUuid
    finetuned_model: URL
    dataset_id: str = Field(min_length=1, description="Preference data to train on.")
    validation_dataset_id: str = Field(min_length=1, description="Held-out preference data.")
    algorithm: RLHFAlgorithm = Field(strict=False)
    algorithm_config: DPOAlignmentConfig
    optimizer_config: OptimizerConfig
    training_config: TrainingConfig
    hyperparam_search_config: dict[str, Any]
    logger_config: dict[str, Any]


AnyTrainingRequest = SupervisedFineTuneRequest | PreferenceOptimizeRequest
REQUESTS: dict[str, type[SupervisedFineTuneRequest] | type[PreferenceOptimizeRequest]] = {
    request.method: request for request in (SupervisedFineTuneRequest, PreferenceOptimizeRequest)
}
"""Request class of each training method."""


def unsupported(request: AnyTrainingRequest) -> list[ErrorDetail]:
    """List the fields whose value is valid in the schema and cannot be trained by this version."""
    found: list[tuple[str, str]] = []
    if isinstance(request, PreferenceOptimizeRequest):
        found.append(("algorithm_config", "preference optimization (DPO) is not available in this version"))
        return _details(found)
    algorithm = request.algorithm_config
    if algorithm is not None and algorithm.type == "QAT":
        found.append(("algorithm_config.type", "QAT is not available in this version; use LoRA or null"))
    elif algorithm is not None and algorithm.quantize_base:
        found.append(
            ("algorithm_config.quantize_base", "4-bit base weights are not available in this version")
        )
    efficiency = request.training_config.efficiency_config
    for flag in ("memory_efficient_fsdp_wrap", "fsdp_cpu_offload"):
        if efficiency is not None and getattr(efficiency, flag):
            found.append(
                (
                    f"training_config.efficiency_config.{flag}",
                    "shards over several devices (FSDP); this job has one",
                )
            )
    return _details(found)


def _details(found: list[tuple[str, str]]) -> list[ErrorDetail]:
    return [{"loc": list(field.split(".")), "msg": msg, "type": "unsupported"} for field, msg in found]


def error_details(errors: Iterable[Mapping[str, Any]]) -> list[ErrorDetail]:
    """Reduce pydantic's errors to the field's path, the rule with the value, and the rule's type.

    :param errors: of ``ValidationError.errors()``, or of FastAPI's own error, whose paths start at ``body``.
    """
    return [
        {"loc": _field_path(e["loc"]), "msg": e["msg"] + _offending_value(e), "type": e["type"]}
        for e in errors
    ]


def _field_path(loc: Sequence[int | str]) -> list[int | str]:
    """Leave out what is no field: the place that FastAPI puts first and the tag of the algorithm union."""
    parts = list(loc[1:] if loc[:1] in (("body",), ("query",), ("path",)) else loc)
    if parts[:1] == ["algorithm_config"] and parts[1:2] in (["LoRA"], ["QAT"]):
        del parts[1]
    return parts


def _offending_value(error: Mapping[str, Any]) -> str:
    """Quote a short scalar; never an unknown field's, which may be a secret put in the wrong place."""
    value = error["input"]
    if error["type"] in ("extra_forbidden", "missing", "job_uuid", "unsupported"):
        return ""
    if isinstance(value, str | int | float | bool):
        return f", got {repr(value)[:80]}"
    return ""
