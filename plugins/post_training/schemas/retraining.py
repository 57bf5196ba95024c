"""What a team retrains every night: the model, the data, the stages, and when the result is promoted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from post_training.schemas.base import StrictModel
from post_training.schemas.evaluation import EvaluationConfig
from post_training.schemas.gates import GatesConfig
from post_training.schemas.preparation import SplitConfig
from post_training.schemas.requests import REQUESTS, PreferenceOptimizeRequest, SupervisedFineTuneRequest
from post_training.schemas.training import DatasetFormat

Stage = Literal["supervised_fine_tune", "preference_optimize", "quantize"]

STAGES: Mapping[Stage, str] = {
    SupervisedFineTuneRequest.method: SupervisedFineTuneRequest.method,
    PreferenceOptimizeRequest.method: PreferenceOptimizeRequest.method,
    "quantize": SupervisedFineTuneRequest.method,
}
"""Stages in their order -> the training method of each."""

MODEL_FIELDS = {
    SupervisedFineTuneRequest.method: "model",
    PreferenceOptimizeRequest.method: "finetuned_model",
}
"""Training method -> the field of its request that names the model to start from."""

_OURS = ("dataset_id", "validation_dataset_id", "data_format")


def _check_name(value: str) -> str:
    """Refuse what Airflow's templates would take for a value of Python's own."""
    if value in ("None", "True", "False"):
        raise PydanticCustomError(
            "name", "must be no word of Python's own, got {value}", {"value": repr(value)}
        )
    return value


def _check_timezone(value: str) -> str:
    """Refuse what the time zone database does not have."""
    try:
        ZoneInfo(value)
    except (ValueError, OSError, ZoneInfoNotFoundError):
        raise PydanticCustomError(
            "timezone", "must be a time zone like Europe/Berlin, got {value}", {"value": repr(value)}
        ) from None
    return value


StageConfig = Annotated[
    dict[str, Any] | None,
    Field(
        description="Request of the stage, without job_uuid, model and data sets, which the retraining fills"
        " in; null leaves the stage out."
    ),
]


class RetrainedModelConfig(StrictModel):
    """What is retrained."""

    name: Annotated[str, AfterValidator(_check_name)] = Field(
        pattern=r"^[A-Za-z]([\w. -]{0,198}\w)?$",
        description="Name in MLflow's model registry, made with the first promotion: a letter first, up to"
        " 200 letters, digits, spaces and . _ -",
    )
    base: str | None = Field(
        default=None,
        min_length=1,
        description="Base model: a hub id, a path under an allowed root, or an MLflow URI; null is the"
        " deployment's default model.",
    )
    start_from: Literal["base", "champion"] = Field(
        default="base",
        description="Where training starts: at the base model, or at the champion, while there is one.",
    )


class RetrainingDataConfig(SplitConfig):
    """What it is trained on. Which part a row lies in is a hash of its question, the same every night."""

    dataset_id: str = Field(
        min_length=1, description="Rows: a registered id, a path under an allowed root, or a URI."
    )
    data_format: DatasetFormat = Field(
        default=DatasetFormat.instruct,
        strict=False,
        description="What a row is: instruct, a question with its answer, or dialog.",
    )
    preference_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        description="Pairs of chosen and rejected answers, which preference_optimize trains on.",
    )
    skip_unchanged: bool = Field(
        default=True,
        description="Whether a run ends at once where no row that it would train on is new since the last"
        " promotion, or where the same data and configuration were decided on before.",
    )


class RetrainingEvaluationConfig(EvaluationConfig):
    """How base, champion and candidate are compared."""

    dataset_id: str | None = Field(  # type: ignore[assignment]
        default=None,
        min_length=1,
        description="Held-out rows of your own; null is the evaluation part of the data.",
    )


class ApprovalConfig(StrictModel):
    """Whether a person is asked before a promotion."""

    required: bool = Field(
        default=False,
        description="Whether a person has to approve in Airflow. Until they have answered, or the time is"
        " over, no other run begins.",
    )
    timeout_hours: int = Field(
        default=72,
        ge=1,
        le=24 * 90,
        description="After so many hours without an answer nothing is promoted, and the next run may begin.",
    )

    @property
    def timeout(self) -> timedelta:
        """How long an answer is waited for."""
        return timedelta(hours=self.timeout_hours)


class RetrainingConfig(StrictModel):
    """A scheduled retraining."""

    model: RetrainedModelConfig = Field(description="What is retrained.")
    data: RetrainingDataConfig = Field(description="What it is trained on.")
    supervised_fine_tune: StageConfig = None
    preference_optimize: StageConfig = None
    quantize: StageConfig = None
    evaluation: RetrainingEvaluationConfig = Field(
        default_factory=RetrainingEvaluationConfig, description="How models are compared."
    )
    gate: GatesConfig = Field(default_factory=GatesConfig, description="What a candidate must show.")
    approval: ApprovalConfig = Field(
        default_factory=ApprovalConfig, description="Whether a person is asked before a promotion."
    )
    checkpoint: Literal["best", "last"] = Field(
        default="best",
        description="Which checkpoint of a stage goes on: that of the lowest validation loss, or the last.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> RetrainingConfig:
        problems = [*_problems(self)]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    @property
    def stages(self) -> list[Stage]:
        """The stages that are trained, in their order."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    def searches(self, stage: str) -> bool:
        """Whether a stage tries hyperparameters before it trains."""
        return bool((getattr(self, stage) or {}).get("hyperparam_search_config"))

    def stage_request(
        self, stage: Stage, model: str | None, train: str, validation: str | None
    ) -> dict[str, Any]:
        """Return the body of a stage's request, without ``job_uuid``.

        :param model: what it starts from; None is the deployment's default.
        :param train: data set to train on.
        :param validation: data set to validate on.
        """
        method, body = STAGES[stage], dict(getattr(self, stage))
        training = dict(body.get("training_config") or {})
        data = {
            "dataset_id": train,
            "validation_dataset_id": validation,
            "data_format": self.data.data_format.value,
        }
        training["data_config"] = {**dict(training.get("data_config") or {}), **data}
        return {
            "hyperparam_search_config": {},
            "logger_config": {},
            **body,
            MODEL_FIELDS[method]: model,
            "training_config": training,
        }

    def digest(self, *parts: Any) -> str:
        """Return a SHA-256 of the configuration, the approval apart, and of what else it is applied to."""
        text = json.dumps([self.model_dump(mode="json", exclude={"approval"}), *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class ScheduleConfig(StrictModel):
    """What wakes a retraining; nothing leaves it to whoever triggers it."""

    cron: str | None = Field(default=None, min_length=1, description="Cron expression; null is no time.")
    timezone: Annotated[str, AfterValidator(_check_timezone)] = Field(
        default="UTC", description="Of the cron expression."
    )
    assets: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="URIs of Airflow's assets: an update of any starts a run."
    )


class RetrainingFile(RetrainingConfig):
    """A retraining as a file configures it."""

    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="What wakes it.")


def _problems(config: RetrainingConfig) -> Iterator[InitErrorDetails]:
    if not config.stages:
        yield _problem(("supervised_fine_tune",), f"one stage of {', '.join(STAGES)} must be given", None)
    if config.preference_optimize is not None and config.data.preference_dataset_id is None:
        yield _problem(
            ("data", "preference_dataset_id"), "is required: preference_optimize trains on pairs", None
        )
    yield from _problems_of_parts(config)
    yield from _problems_of_gates(config)
    for stage in config.stages:
        yield from _problems_of_stage(config, stage)


def _problems_of_gates(config: RetrainingConfig) -> Iterator[InitErrorDetails]:
    """Yield the gates whose metric nothing measures: before a training, not after it."""
    own = config.evaluation
    pairs_part = config.data.preference_dataset_id is not None and config.data.evaluation_fraction > 0
    measured = {
        "exact_match": own.exact_match is not None,
        "reward_accuracy": own.preference_dataset_id is not None or pairs_part,
        "reward_margin": own.preference_dataset_id is not None or pairs_part,
    }
    for number, gate in enumerate(config.gate.gates):
        if gate.metric == "reward_accuracy" and gate.compares and gate.against == "base":
            yield _problem(
                ("gate", "gates", number, "against"),
                "rewards are relative to the base, whose accuracy is 0: set at_least instead",
                gate.against,
            )
        if not measured.get(gate.metric, True):
            needs = "exact_match" if gate.metric == "exact_match" else "preference_dataset_id"
            yield _problem(
                ("gate", "gates", number, "metric"),
                f"is not measured without evaluation.{needs}, got {gate.metric!r}",
                gate.metric,
            )


def _problems_of_parts(config: RetrainingConfig) -> Iterator[InitErrorDetails]:
    fraction, own = config.data.evaluation_fraction, config.evaluation
    if own.dataset_id is None and own.data_format not in (DatasetFormat.instruct, config.data.data_format):
        yield _problem(
            ("evaluation", "data_format"), "is that of evaluation.dataset_id, which is null", own.data_format
        )
    if config.evaluation.dataset_id is None and fraction == 0:
        yield _problem(
            ("data", "evaluation_fraction"), "must be above 0, or evaluation.dataset_id be given", fraction
        )
    if config.evaluation.dataset_id is not None and fraction > 0:
        yield _problem(
            ("data", "evaluation_fraction"),
            "must be 0: evaluation.dataset_id is what models are compared on",
            fraction,
        )


def _problems_of_stage(config: RetrainingConfig, stage: Stage) -> Iterator[InitErrorDetails]:
    """Yield what a stage's request breaks, its place in front; checked with stand-ins for model and data."""
    given = getattr(config, stage)
    method = STAGES[stage]
    for path in _filled_in(given, method):
        yield _problem((stage, *path), "must be left out: the retraining fills it in", None)
        return
    body = config.stage_request(stage, config.model.base or "base", "rows.jsonl", None)
    try:
        request = REQUESTS[method].model_validate({**body, "job_uuid": "stage"}, strict=False)
    except ValidationError as error:
        for detail in error.errors():
            loc = tuple(part for part in detail["loc"] if part not in ("LoRA", "QAT"))
            yield _problem((stage, *loc), detail["msg"], detail["input"])
        return
    if request.logger.log_model is False:
        yield _problem(
            (stage, "logger_config", "log_model"),
            "must not be false: the next stage reads it from MLflow",
            False,
        )
    algorithm = request.algorithm_config
    kind = getattr(algorithm, "type", None)
    if stage == "quantize" and kind != "QAT":
        yield _problem((stage, "algorithm_config", "type"), "must be 'QAT'", kind)
    if config.checkpoint == "best" and request.training_config.max_validation_steps == 0:
        yield _problem(
            (stage, "training_config", "max_validation_steps"),
            "must not be 0: without a validation no checkpoint is known to be the best",
            0,
        )
    steps = request.training_config.max_steps_per_epoch
    if config.data.rows == "new" and steps not in (0, None):
        yield _problem(
            (stage, "training_config", "max_steps_per_epoch"),
            "must be 0 with data.rows 'new': what a night leaves out would count as trained",
            steps,
        )
    if config.data.validation_fraction == 0 and config.checkpoint == "best":
        yield _problem(
            ("checkpoint",),
            "must be 'last': data.validation_fraction is 0, so no checkpoint is known to be the best",
            "best",
        )


def _filled_in(given: Mapping[str, Any], method: str) -> Iterator[tuple[str, ...]]:
    """Yield the places of what a stage must not name itself."""
    for name in ("job_uuid", MODEL_FIELDS[method]):
        if name in given:
            yield (name,)
    training = given.get("training_config")
    data = training.get("data_config") if isinstance(training, Mapping) else None
    for name in _OURS:
        if isinstance(data, Mapping) and name in data:
            yield ("training_config", "data_config", name)


def _problem(loc: tuple[str | int, ...], rule: str, value: Any) -> InitErrorDetails:
    """Return one broken rule in pydantic's own shape."""
    return InitErrorDetails(
        type=PydanticCustomError("retraining", "{rule}", {"rule": rule}), loc=loc, input=value
    )
