"""A hyperparameter search: which fields of the request vary, what is measured, and how much may be tried."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from post_training.schemas import record as names
from post_training.schemas.base import Count, StrictModel

MAX_TRIALS, MAX_PARALLEL, MAX_FIELDS, MAX_CHOICES, MAX_CELLS = 500, 16, 20, 50, 10_000
MAX_STEPS, MAX_PATH_LENGTH = 1_000_000, 200

Direction = Literal["minimize", "maximize"]


def _validation(metric: str) -> str:
    return f"{names.VALIDATION_PREFIX}{metric}"


ACCURACY = _validation(names.METRIC_REWARD_ACCURACY)
"""The one metric that the parameters of a preference loss do not scale."""

PREFERENCE_METRICS: Mapping[str, Direction] = {
    ACCURACY: "maximize",
    _validation(names.METRIC_REWARD_MARGIN): "maximize",
    _validation(names.METRIC_REWARD_CHOSEN): "maximize",
    _validation(names.METRIC_REWARD_REJECTED): "minimize",
    _validation(names.METRIC_KL): "minimize",
}
"""What only preference jobs report -> its better direction."""

METRICS: Mapping[str, Direction] = {
    names.METRIC_VALIDATION_LOSS: "minimize",
    names.METRIC_PERPLEXITY: "minimize",
    **PREFERENCE_METRICS,
}
"""Validation metric -> its better direction."""

Metric = Literal[
    "validation_loss",
    "perplexity",
    "validation_rewards/accuracies",
    "validation_rewards/margins",
    "validation_rewards/chosen",
    "validation_rewards/rejected",
    "validation_kl",
]


class FloatSpace(StrictModel):
    """Numbers between two, both included."""

    type: Literal["float"] = Field(description="Kind of the space.")
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    log: bool = Field(default=False, description="Whether orders of magnitude are equally likely.")
    step: float | None = Field(default=None, gt=0, description="Distance of the values; null is any.")

    @model_validator(mode="after")
    def _is_a_range(self) -> FloatSpace:
        _check_range(self, smallest=0.0)
        return self

    @property
    def finite(self) -> list[Any] | None:
        """All values, None where they are too many for a grid."""
        if self.step is None or _steps(self) >= MAX_CELLS:
            return None
        low, step = _exact(self.low), _exact(self.step)
        return [float(low + step * k) for k in range(int(_steps(self)) + 1)]

    @property
    def extremes(self) -> list[Any]:
        """The values between which all others lie."""
        return [self.low, self.high]


class IntSpace(StrictModel):
    """Whole numbers between two, both included."""

    type: Literal["int"] = Field(description="Kind of the space.")
    low: int = Field(ge=-(2**31), le=2**31 - 1, description="Smallest value.")
    high: int = Field(ge=-(2**31), le=2**31 - 1, description="Largest value.")
    log: bool = Field(default=False, description="Whether orders of magnitude are equally likely.")
    step: Count = Field(default=1, ge=1, description="Distance of the values.")

    @model_validator(mode="after")
    def _is_a_range(self) -> IntSpace:
        _check_range(self, smallest=1)
        return self

    @property
    def finite(self) -> list[Any] | None:
        """All values, None where they are too many for a grid."""
        return list(range(self.low, self.high + 1, self.step)) if _steps(self) < MAX_CELLS else None

    @property
    def extremes(self) -> list[Any]:
        """The values between which all others lie."""
        return [self.low, self.high]


class CategoricalSpace(StrictModel):
    """One of several values."""

    type: Literal["categorical"] = Field(description="Kind of the space.")
    choices: list[JsonValue] = Field(
        min_length=1, max_length=MAX_CHOICES, description="The values: any that the field may have."
    )

    @model_validator(mode="after")
    def _differ(self) -> CategoricalSpace:
        if len({choice_name(choice) for choice in self.choices}) < len(self.choices):
            raise _broken("choices", "must differ from each other", self.choices)
        return self

    @property
    def finite(self) -> list[Any]:
        """All values."""
        return list(self.choices)

    @property
    def extremes(self) -> list[Any]:
        """All values: there is no order."""
        return list(self.choices)


Space = Annotated[FloatSpace | IntSpace | CategoricalSpace, Field(discriminator="type")]
SPACE_TYPES = ("float", "int", "categorical")


def choice_name(choice: Any) -> str:
    """Return the text by which a study knows a choice: it can hold lists no more than plots can show them."""
    return choice if isinstance(choice, str) else json.dumps(choice, sort_keys=True)


class SearchConfig(StrictModel):
    """What ``hyperparam_search_config`` may hold; {} is no search."""

    space: dict[Annotated[str, Field(max_length=MAX_PATH_LENGTH)], Space] = Field(
        min_length=1,
        max_length=MAX_FIELDS,
        description="Dotted path of a field of the request -> its values.",
    )
    metric: Metric = Field(
        default="validation_loss",
        description="What is compared: its value in the validation at a trial's end.",
    )
    direction: Direction | None = Field(
        default=None, description="minimize or maximize; null is the metric's own better direction."
    )
    sampler: Literal["tpe", "random", "grid", "gp"] = Field(
        default="tpe",
        description="How values are chosen: tpe and gp learn from the trials before, grid takes each"
        " combination once, in a random order; gp needs torch beside the operators.",
    )
    pruner: Literal["none", "median", "hyperband"] = Field(
        default="none", description="Whether and how a trial that falls behind is stopped after an epoch."
    )
    n_trials: int = Field(ge=1, le=MAX_TRIALS, description="Trials in all; those that fail count as well.")
    timeout_seconds: float | None = Field(
        default=None, gt=0, description="After so long no further trial begins; null is never."
    )
    max_parallel: int = Field(default=1, ge=1, le=MAX_PARALLEL, description="Trials at the same time.")
    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of the sampler.")
    use: Literal["checkpoint", "retrain"] = Field(
        default="checkpoint",
        description="Whether the best trial's checkpoints are the job's, or its values are trained anew.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SearchConfig:
        if self.direction == METRICS[self.metric]:
            self.direction = None  # so that one meaning has one spelling
        if self.sampler == "grid":
            self._check_grid()
        return self

    def _check_grid(self) -> None:
        cells = 1
        for path, space in self.space.items():
            values = space.finite
            if values is None or getattr(space, "log", False):
                raise _broken(
                    f"space.{path}", "must have choices, or a step and no log: so a grid needs it", None
                )
            cells *= len(values)
        if cells > MAX_CELLS:
            raise _broken("space", f"must have at most {MAX_CELLS} cells as a grid, has {cells}", None)
        if self.n_trials > cells:
            raise _broken(
                "n_trials", f"must be at most {cells}, the cells of the grid, got {self.n_trials}", None
            )

    @property
    def to(self) -> Direction:
        """Which direction of the metric is better."""
        return self.direction or METRICS[self.metric]


def search_schema() -> dict[str, Any]:
    """Return the JSON schema of the field: a search, {} for none, or a JSON string of either."""
    document = SearchConfig.model_json_schema()
    schema: dict[str, Any] = _inlined(document, document.pop("$defs"))
    required = schema.pop("required")
    return schema | {
        "type": ["object", "string"],
        "dependentRequired": dict.fromkeys(schema["properties"], required),
        "description": SearchConfig.__doc__,
    }


def _inlined(schema: Any, defs: Mapping[str, Any]) -> Any:
    """Replace every ``$ref``: a part of another document has no definitions of its own."""
    if isinstance(schema, list):
        return [_inlined(item, defs) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = {**defs[schema["$ref"].rpartition("/")[2]], **schema}
    dropped = ("$ref", "discriminator")
    return {key: _inlined(value, defs) for key, value in schema.items() if key not in dropped}


def _exact(value: float) -> Fraction:
    """Return a number as it is written: 0.3 is three steps of 0.1."""
    return Fraction(str(value))


def _steps(space: FloatSpace | IntSpace) -> Fraction:
    return (_exact(space.high) - _exact(space.low)) / _exact(space.step or 1)


def _check_range(space: FloatSpace | IntSpace, smallest: float) -> None:
    """Refuse what is no range, or one that a study would silently make another.

    :param smallest: what ``low`` must be at least on a logarithmic scale, or above 0.
    """
    if space.low >= space.high:
        raise _broken("high", f"must be above low, which is {space.low:g}, got {space.high:g}", space.high)
    step = space.step if isinstance(space, FloatSpace) or space.step > 1 else None
    if space.log and (space.low < smallest or space.low <= 0):
        raise _broken("low", f"must be above 0 on a logarithmic scale, got {space.low:g}", space.low)
    if space.log and step is not None:
        raise _broken("step", f"must be left out on a logarithmic scale, got {step:g}", step)
    if step is not None and _steps(space) > MAX_STEPS:
        raise _broken("step", f"must leave at most {MAX_STEPS} values, got {step:g}", step)
    if step is not None and _steps(space).denominator > 1:
        raise _broken(
            "high", f"must be whole steps of {step:g} above low, {space.low:g}, got {space.high:g}", None
        )


def _broken(place: str, rule: str, value: Any) -> ValidationError:
    """Return the error of one field of the model that is being validated."""
    loc = tuple(place.split(".", 1))
    problem = InitErrorDetails(
        type=PydanticCustomError("search", "{rule}", {"rule": rule}), loc=loc, input=value
    )
    return ValidationError.from_exception_data("SearchConfig", [problem])
