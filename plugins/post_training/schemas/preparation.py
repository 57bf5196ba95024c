"""How the data of a scheduled retraining is split, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from post_training.schemas.base import LenientModel, StrictModel
from post_training.schemas.trainer import ProcessResult, TrackingTarget
from post_training.schemas.training import DatasetFormat

PREPARATION_SPEC_FILE = "preparation.json"
PREPARATION_RESULT_FILE = "preparation-result.json"
DATA_FOLDER = "data"
"""Below the process's folder, and below the run's artifacts: the files of the parts, and ``DIGESTS_FILE``."""

DIGESTS_FILE = "trained.digests"
"""The first 16 bytes of the identity of each row that was trained on, and of its question's hash: ascending,
none twice."""

Part = Literal["train", "validation", "evaluation"]


class SplitConfig(StrictModel):
    """What of the data is trained on, and what is held back."""

    rows: Literal["all", "new"] = Field(
        default="all",
        description="Train on all rows of the training part, or only on those that no promoted run has"
        " trained on. The other parts always have all of their rows.",
    )
    validation_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the questions that a training validates on. Where it starts from the champion,"
        " a larger share takes in only questions that the champion was not trained on.",
    )
    evaluation_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the questions that models are compared on. A larger share takes in only"
        " questions that the champion was not trained on.",
    )
    max_bad_row_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the rows that may be unreadable and are skipped."
    )

    @model_validator(mode="after")
    def _leaves_some_to_train_on(self) -> SplitConfig:
        if self.validation_fraction + self.evaluation_fraction >= 1:
            raise PydanticCustomError(
                "split",
                "validation_fraction and evaluation_fraction must be less than 1 together, got {validation}"
                " and {evaluation}",
                {"validation": self.validation_fraction, "evaluation": self.evaluation_fraction},
            )
        return self


class PreparationSource(LenientModel):
    """One data set, and how its rows are read."""

    source: str = Field(description="Resolved data: an absolute path or a URI.")
    method: Literal["supervised_fine_tune", "preference_optimize"] = Field(
        description="The training method whose rows they are."
    )
    data_format: DatasetFormat = Field(description="Shape of a row.")
    trained: bool = Field(default=True, description="Whether a stage trains on it; else it only evaluates.")


class PreparationSpec(LenientModel):
    """One attempt at preparing one night's data, everything resolved on this worker.

    The process trusts it.
    """

    split: SplitConfig
    sources: dict[str, PreparationSource] = Field(description="rows, and pairs where there are some.")
    held_out: dict[str, PreparationSource] = Field(
        default_factory=dict,
        description="Data that models are compared on: what has one of its questions is not trained on.",
    )
    trained: str | None = Field(
        default=None,
        description="DIGESTS_FILE of the last promoted run: an absolute path or a URI; null is that nothing"
        " was trained on before.",
    )
    starts_from_trained: bool = Field(
        default=False,
        description="Whether training starts from the model that was trained on that: then none of it is"
        " validated on either.",
    )
    model_roots: tuple[Path, ...] = ()
    work_dir: Path
    max_data_bytes: int = 2**32
    tracking: TrackingTarget | None = None


class PreparedSource(LenientModel):
    """What one data set has become."""

    rows: dict[Part, int] = Field(description="Rows in the file of each part.")
    files: dict[Part, str | None] = Field(
        description="Name of each part's file in DATA_FOLDER; null where the part is empty."
    )
    new_rows: int = Field(description="Rows of the training part that were not trained on before.")
    skipped: int = Field(description="Rows that could not be read and were left out.")
    held_out: int = Field(default=0, description="Rows that were left out for a question that is held out.")
    kept: dict[Part, int] = Field(
        default_factory=dict,
        description="Rows that the fractions put into a part, and that stay in the training part since their"
        " question was trained on before.",
    )
    digest: str = Field(
        description="SHA-256 of all rows that could be read and of their parts, in whatever order they stand."
    )


class HeldOutSource(LenientModel):
    """One data set of the user's own that models are compared on."""

    rows: int = Field(description="Rows that could be read.")
    trained: int = Field(description="Of them, those whose question was trained on before.")
    digest: str = Field(description="SHA-256 of the rows, in whatever order they stand.")


class PreparationResult(ProcessResult):
    """What the data has become."""

    sources: dict[str, PreparedSource] = Field(default_factory=dict, description="By the spec's names.")
    held_out: dict[str, HeldOutSource] = Field(default_factory=dict, description="By the spec's names.")
