"""How models are compared on held-out data, and what came of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from post_training.schemas.base import Count, LenientModel, StrictModel
from post_training.schemas.jobs import FiniteOrNull
from post_training.schemas.trainer import ProcessResult, TrackingTarget, TrainerSpec
from post_training.schemas.training import DatasetFormat

EVALUATION_SPEC_FILE = "evaluation.json"
EVALUATION_RESULT_FILE = "evaluation-result.json"
VALUES_FILE = "values.json"
"""An artifact of the run too: ``EvaluationValues``."""

METRIC_LOSS = "loss"
METRIC_PERPLEXITY = "perplexity"
METRIC_EXACT_MATCH = "exact_match"
METRIC_REWARD_ACCURACY = "reward_accuracy"
METRIC_REWARD_MARGIN = "reward_margin"

MAX_LOSS = 700.0
"""Nats whose exponential a float holds."""


def _check_pattern(value: str) -> str:
    """Refuse what Python's ``re`` does not read."""
    try:
        re.compile(value)
    except re.error as error:
        raise PydanticCustomError(
            "pattern",
            "must be a regular expression: {reason}, got {value}",
            {"reason": str(error), "value": repr(value)},
        ) from None
    return value


ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,50}$")]
"""What a model is called in tables and metrics."""


class AnswerCheck(StrictModel):
    """Answers are generated, and right if a pattern finds in them what it finds in the expected ones."""

    pattern: Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_check_pattern)] = Field(
        description="Python regular expression; what its first group, or without one the whole, matches last"
        " is compared, without commas, outer white space and a last full stop. GSM8K: '#### *(-?[0-9.,]+)'."
    )
    max_new_tokens: Count = Field(
        default=256, ge=1, description="Longest answer that is generated, in tokens."
    )
    max_examples: Count | None = Field(
        default=100, ge=1, description="Rows that are answered, the first ones; null is all that are scored."
    )


class EvaluationConfig(StrictModel):
    """What is measured of each model, on which data."""

    dataset_id: str = Field(
        min_length=1, description="Held-out rows: a registered id, a path under an allowed root, or a URI."
    )
    data_format: DatasetFormat = Field(
        default=DatasetFormat.instruct,
        strict=False,
        description="What a row is: instruct, a question with its answer, or dialog.",
    )
    max_examples: Count | None = Field(
        default=None, ge=1, description="Rows of each data set that are used, the first ones; null is all."
    )
    max_bad_row_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the rows that may be unreadable and are skipped."
    )
    exact_match: AnswerCheck | None = Field(
        default=None, description="How generated answers are checked; null generates none."
    )
    preference_dataset_id: str | None = Field(
        default=None, min_length=1, description="Held-out pairs; null measures no rewards."
    )
    beta: float = Field(
        default=0.1, gt=0, description="β of the rewards β · (log π − log π_reference), in 1/nat."
    )
    batch_size: Count = Field(default=8, ge=1, description="Rows or pairs that are scored together.")
    max_seq_length: Count = Field(
        default=2048, ge=8, description="Longest sequence in tokens, as in training."
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        default="bf16", description="Type of weights and arithmetic; fp16 needs a GPU."
    )
    samples: int = Field(
        default=10, ge=0, le=100, description="Questions whose answers are in the table of samples."
    )


class EvaluationRequest(StrictModel):
    """Models side by side: the rewards of each are relative to the first."""

    models: dict[ModelName, str] = Field(
        min_length=1,
        max_length=8,
        description="Name in the tables -> hub id, path under an allowed root, or MLflow URI; adapters too.",
    )
    config: EvaluationConfig = Field(description="What is measured.")

    @model_validator(mode="after")
    def _names_models(self) -> EvaluationRequest:
        for name, model in self.models.items():
            if not model:
                raise PydanticCustomError("model", "models.{name}: must name a model, got ''", {"name": name})
        return self


class EvaluationSpec(LenientModel):
    """One attempt at one evaluation, everything resolved on this worker. The process trusts it."""

    config: EvaluationConfig
    models: dict[str, str] = Field(description="Name -> absolute path, hub id, or MLflow URI.")
    data: str = Field(description="Resolved held-out rows: an absolute path or a URI.")
    preference_data: str | None = Field(default=None, description="The same for pairs.")
    model_roots: tuple[Path, ...] = ()
    work_dir: Path
    max_data_bytes: int = 2**32
    cache_dir: Path | None = None
    max_cache_bytes: int = 20 * 2**30
    tracking: TrackingTarget | None = None


WorkerSpec = TrainerSpec | EvaluationSpec
"""What a process of a worker is told."""


class ExampleValues(LenientModel):
    """Values of one model, one for each example that all models could take, in file order.

    From them a comparison of two models can be drawn by examples.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")  # of a model that has diverged

    nll: list[float] = Field(default_factory=list, description="Nats of each row's scored tokens.")
    tokens: list[int] = Field(default_factory=list, description="How many those are.")
    correct: list[bool] = Field(default_factory=list, description="Of the rows that were answered.")
    reward_margin: list[float] = Field(
        default_factory=list, description="Of each pair: chosen less rejected."
    )

    def metrics(self) -> dict[str, float]:
        """Return the means that can be formed: loss per scored token, shares, margin per pair."""
        return dict(self._metrics())

    def _metrics(self) -> Iterator[tuple[str, float]]:
        if self.tokens:
            loss = sum(self.nll) / sum(self.tokens)
            yield METRIC_LOSS, loss
            yield METRIC_PERPLEXITY, math.exp(min(loss, MAX_LOSS))
        if self.correct:
            yield METRIC_EXACT_MATCH, sum(self.correct) / len(self.correct)
        if self.reward_margin:
            margins = self.reward_margin
            yield METRIC_REWARD_ACCURACY, sum(margin > 0 for margin in margins) / len(margins)
            yield METRIC_REWARD_MARGIN, sum(margins) / len(margins)


class EvaluationValues(LenientModel):
    """Every value that an evaluation's metrics are means of."""

    models: dict[str, ExampleValues]


class EvaluationResult(ProcessResult):
    """What an evaluation came to."""

    metrics: dict[str, dict[str, FiniteOrNull]] = Field(
        default_factory=dict, description="Model's name -> metric -> value."
    )
