"""What a candidate must show to take the champion's place, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from post_training.schemas.base import LenientModel, StrictModel
from post_training.schemas.jobs import FiniteOrNull

Metric = Literal["loss", "perplexity", "exact_match", "reward_accuracy", "reward_margin"]
"""What an evaluation measures: the names are those of ``ExampleValues.metrics``."""

DIRECTION: Mapping[Metric, Literal["lower", "higher"]] = {
    "loss": "lower",
    "perplexity": "lower",
    "exact_match": "higher",
    "reward_accuracy": "higher",
    "reward_margin": "higher",
}
"""Which values of a metric are the better ones."""

COLUMNS = (
    "metric",
    "against",
    "passed",
    "candidate",
    "other",
    "improvement",
    "lower_bound",
    "relative_improvement",
    "relative_lower_bound",
    "sentence",
)
"""Of a decision's table."""


class Gate(StrictModel):
    """Conditions on one metric; all that are set must hold."""

    metric: Metric = Field(description="Metric of the evaluation.")
    at_least: float | None = Field(default=None, description="Smallest value that the candidate may have.")
    at_most: float | None = Field(default=None, description="Largest value that the candidate may have.")
    min_improvement: float | None = Field(
        default=None,
        description="By how much the candidate must be better, in the metric's own unit; positive is better"
        " for every metric, 0 lets an equal model pass, negative allows that much loss.",
    )
    min_relative_improvement: float | None = Field(
        default=None, gt=-1, description="The same as a fraction of the other model's value."
    )
    confidence: float | None = Field(
        default=None,
        gt=0.5,
        lt=1,
        description="Confidence with which the improvements reach their minimum, by a paired bootstrap over"
        " the examples; alone it asks for min_improvement 0. Null compares the metrics as they are.",
    )
    against: Literal["champion", "base"] = Field(
        default="champion",
        description="The model that is compared with; while there is no champion, nothing is.",
    )

    @property
    def compares(self) -> bool:
        """Whether it needs the other model."""
        return self.min_improvement is not None or self.min_relative_improvement is not None

    @field_validator("at_most")
    @classmethod
    def _leaves_room(cls, at_most: float | None, info: ValidationInfo) -> float | None:
        at_least = info.data.get("at_least")
        if at_most is not None and at_least is not None and at_most < at_least:
            raise PydanticCustomError(
                "bounds",
                "must not be below at_least, {at_least}, got {value}",
                {"at_least": at_least, "value": at_most},
            )
        return at_most

    @field_validator("confidence")
    @classmethod
    def _is_of_an_improvement(cls, confidence: float | None, info: ValidationInfo) -> float | None:
        if confidence is not None and _is_bounded(info.data) and not _is_compared(info.data):
            raise PydanticCustomError(
                "confidence",
                "is that of an improvement, not of at_least and at_most: set min_improvement or"
                " min_relative_improvement, got {value}",
                {"value": confidence},
            )
        return confidence

    @field_validator("against")
    @classmethod
    def _is_compared_with(cls, against: str, info: ValidationInfo) -> str:
        data = info.data
        if against != "champion" and data.get("confidence", "invalid") is None and not _is_compared(data):
            raise PydanticCustomError(
                "against",
                "is not compared with: set min_improvement, min_relative_improvement or confidence,"
                " got {value}",
                {"value": repr(against)},
            )
        return against

    @model_validator(mode="after")
    def _asks_something(self) -> Gate:
        if not self.compares and self.confidence is not None:
            self.min_improvement = 0.0
        if not self.compares and self.at_least is None and self.at_most is None:
            raise PydanticCustomError(
                "gate",
                "asks nothing: set min_improvement, min_relative_improvement, confidence, at_least or"
                " at_most, got metric {metric} alone",
                {"metric": repr(self.metric)},
            )
        return self


def _is_bounded(data: Mapping[str, Any]) -> bool:
    return any(data.get(name) is not None for name in ("at_least", "at_most"))


def _is_compared(data: Mapping[str, Any]) -> bool:
    """Say whether a minimum is set; one that is absent was set to what is refused already."""
    return any(
        data.get(name, "invalid") is not None for name in ("min_improvement", "min_relative_improvement")
    )


class GatesConfig(StrictModel):
    """When a candidate is accepted: all gates hold."""

    gates: list[Gate] = Field(
        default=[Gate(metric="loss", min_improvement=0.0, confidence=0.95)],
        min_length=1,
        max_length=20,
        description="What must hold, all of them: each has a metric (loss, perplexity, exact_match,"
        " reward_accuracy or reward_margin), and at_least, at_most, min_improvement or"
        " min_relative_improvement; the last two with a confidence, against champion or base.",
    )
    bootstrap_resamples: int = Field(
        default=2000,
        ge=100,
        le=100_000,
        validate_default=True,
        description="Resamples from which a confidence is read.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the resamples.")

    @field_validator("bootstrap_resamples")
    @classmethod
    def _show_the_confidence(cls, resamples: int, info: ValidationInfo) -> int:
        confidence = max((gate.confidence or 0.0 for gate in info.data.get("gates", [])), default=0.0)
        if resamples * (1 - confidence) < 1:
            raise PydanticCustomError(
                "resamples",
                "are too few to show a confidence of {confidence}, got {value}",
                {"confidence": confidence, "value": resamples},
            )
        return resamples


class GateOutcome(LenientModel):
    """What came of one gate."""

    gate: Gate
    passed: bool
    candidate: FiniteOrNull = Field(description="The candidate's value.")
    other: FiniteOrNull = Field(default=None, description="The other's; null where nothing was compared.")
    improvement: FiniteOrNull = Field(default=None, description="Positive is better.")
    lower_bound: FiniteOrNull = Field(default=None, description="Of the improvement, at gate.confidence.")
    relative_improvement: FiniteOrNull = Field(
        default=None, description="As a fraction of the other's value; null where that is 0."
    )
    relative_lower_bound: FiniteOrNull = Field(default=None, description="Of the relative improvement.")
    sentence: str


class Decision(LenientModel):
    """Whether the candidate takes the champion's place."""

    accepted: bool
    reason: str = Field(description="One sentence: what failed, or else what was reached.")
    outcomes: list[GateOutcome]

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Return columns and rows of a table, one row for each gate."""
        rows = [
            {**outcome.model_dump(), "metric": outcome.gate.metric, "against": _against(outcome.gate)}
            for outcome in self.outcomes
        ]
        return list(COLUMNS), [[row[name] for name in COLUMNS] for row in rows]


def _against(gate: Gate) -> str | None:
    return gate.against if gate.compares else None
