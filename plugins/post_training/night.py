"""One night of a scheduled retraining: what its prepared data and the champion make of its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from post_training.errors import DataError
from post_training.schemas.preparation import DATA_FOLDER, DIGESTS_FILE, Part, PreparationResult
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from post_training.schemas.retraining import STAGES, RetrainingConfig, Stage

ROWS, PAIRS = "rows", "pairs"
SOURCES = {SupervisedFineTuneRequest.method: ROWS, PreferenceOptimizeRequest.method: PAIRS}
"""Training method -> which of the prepared data it reads."""

TAG_TRAINED = "post_training.trained"
"""Of a promoted version: URI of the digests of all rows, and of their questions, that it and those before it
were trained on."""

HELD_BACK: tuple[Part, ...] = ("validation", "evaluation")
COUNTS = ("new_rows", "skipped", "held_out")
"""Of a ``PreparedSource``: what of its rows is no part."""


def trained_sources(config: RetrainingConfig) -> set[str]:
    """Return which of the data the stages train on; the rest is for comparing models alone."""
    return {SOURCES[STAGES[stage]] for stage in config.stages}


@dataclass(frozen=True)
class Night:
    """What a night is made from.

    :param run_id: its MLflow run, which holds the prepared data.
    :param base: the base model, resolved.
    :param champion: URI of the champion that it is compared with, None without one.
    """

    config: RetrainingConfig
    run_id: str
    prepared: PreparationResult
    base: str
    champion: str | None

    @property
    def start(self) -> str:
        """The model to start from."""
        from_champion = self.champion is not None and self.config.model.start_from == "champion"
        return str(self.champion) if from_champion else self.base

    @property
    def files(self) -> list[str]:
        """The parts of the data, among the artifacts of the night's run."""
        names = (file for source in self.prepared.sources.values() for file in source.files.values())
        return [f"{DATA_FOLDER}/{name}" for name in names if name is not None]

    @property
    def stages(self) -> list[Stage]:
        """The stages that are trained: where only new rows are, those for which there are some.

        :raises DataError: if there is nothing to train on though all rows may be, or none of them is left.
        """
        empty = [stage for stage in self.config.stages if self._train(stage) is None]
        if empty and (self.config.data.rows == "all" or empty == self.config.stages):
            source = SOURCES[STAGES[empty[0]]]
            raise DataError(f"the training part of the {source} is empty: {empty[0]} cannot train")
        return [stage for stage in self.config.stages if stage not in empty]

    def digest(self) -> str:
        """Return a SHA-256 of all that decides what comes of the night."""
        digests = {name: source.digest for name, source in self.prepared.sources.items()}
        held_out = {name: source.digest for name, source in self.prepared.held_out.items()}
        return self.config.digest(digests, held_out, self.base, self.champion)

    def metrics(self) -> dict[str, float]:
        """Return what became of the rows, as metrics of the night's run."""
        counts: dict[str, int] = {}
        for name, source in self.prepared.sources.items():
            counts |= {f"{name}/{part}": rows for part, rows in source.rows.items()}
            counts |= {f"{name}/kept_out_of_{part}": source.kept.get(part, 0) for part in HELD_BACK}
            counts |= {f"{name}/{field}": getattr(source, field) for field in COUNTS}
        for name, own in self.prepared.held_out.items():
            counts |= {f"own_{name}/rows": own.rows, f"own_{name}/trained_on": own.trained}
        return {name: float(count) for name, count in counts.items()}

    def nothing_new(self) -> str | None:
        """Return why there is nothing to learn, None where there is something.

        :raises DataError: as ``stages``.
        """
        data = self.config.data
        trained = trained_sources(self.config)
        new = sum(self.prepared.sources[name].new_rows for name in trained)
        if new == 0 and self.champion is not None and (data.skip_unchanged or data.rows == "new"):
            return (
                f"No row of the data is new since the last promotion of {self.config.model.name}:"
                " there is nothing to learn."
            )
        if "quantize" in self.config.stages and "quantize" not in self.stages:
            return "No row of the data is new since the last promotion: quantize has nothing to train on."
        return None

    def outcome(self) -> dict[str, Any]:
        """Return what the tasks behind need to know.

        :raises DataError: if a part of the data is empty that one of them reads.
        """
        return {
            "mlflow_run_id": self.run_id,
            "registered_model": self.config.model.name,
            "base": self.base,
            "start": self.start,
            "checkpoint": self.config.checkpoint,
            "requests": {stage: self._request(stage) for stage in self.stages},
            "evaluation": self._evaluation(),
            "gate": self.config.gate.model_dump(mode="json"),
            "lineage": self._lineage(),
        }

    def _train(self, stage: Stage) -> str | None:
        return self._uri(SOURCES[STAGES[stage]], "train")

    def _request(self, stage: Stage) -> dict[str, Any]:
        """Return a stage's request without the model to start from, which another stage may make."""
        source = SOURCES[STAGES[stage]]
        validation = self._uri(source, "validation")
        if validation is None and self.config.checkpoint == "best":
            raise DataError(f"{self._emptiness(source, 'validation')}, and checkpoint 'best' needs one")
        train = self._train(stage)
        assert train is not None, "only such stages are left"  # noqa: S101
        return self.config.stage_request(stage, None, train, validation)

    def _evaluation(self) -> dict[str, Any]:
        """Return the evaluation's config, its data filled in."""
        own = self.config.evaluation
        rows = own.dataset_id or self._uri(ROWS, "evaluation")
        pairs = own.preference_dataset_id or self._uri(PAIRS, "evaluation")
        needs = {ROWS: rows}
        if any(gate.metric.startswith("reward_") for gate in self.config.gate.gates):
            needs[PAIRS] = pairs
        for source, uri in needs.items():
            if uri is None:
                raise DataError(self._emptiness(source, "evaluation"))
        self._check_own()
        data_format = (own if own.dataset_id else self.config.data).data_format.value
        filled = {"dataset_id": rows, "data_format": data_format, "preference_dataset_id": pairs}
        return {**own.model_dump(mode="json"), **filled}

    def _emptiness(self, source: str, part: Part) -> str:
        """Say why a part of the data that is held back is empty."""
        fraction = f"data.{part}_fraction {getattr(self.config.data, f'{part}_fraction')}"
        kept = self.prepared.sources[source].kept.get(part, 0)
        reason = f"{fraction} of so few is none"
        if kept:
            reason = f"{self.champion} was trained on all {kept} that {fraction} puts there"
        return f"the {part} part of the {source} is empty: {reason}"

    def _check_own(self) -> None:
        """Refuse data of the user's own on which the champion only repeats what it has learnt.

        :raises DataError: naming its field.
        """
        fields = {ROWS: "dataset_id", PAIRS: "preference_dataset_id"}
        for name, own in self.prepared.held_out.items():
            if own.trained and own.trained == own.rows:
                raise DataError(
                    f"evaluation.{fields[name]} must have questions that {self.champion} was not trained on:"
                    f" it was on those of all {own.rows} rows"
                )

    def _lineage(self) -> dict[str, str]:
        """Return the tags of a version that comes of this."""
        digests = {f"post_training.digest.{name}": one.digest for name, one in self.prepared.sources.items()}
        return {
            "post_training.retraining": self.run_id,
            "post_training.base_model": self.base,
            "post_training.started_from": self.start,
            "post_training.replaces": self.champion or "",
            "post_training.configuration": self.config.digest(),
            TAG_TRAINED: f"runs:/{self.run_id}/{DATA_FOLDER}/{DIGESTS_FILE}",
            **digests,
        }

    def _uri(self, source: str, part: Part) -> str | None:
        """Return where a part of the data is, None where it is empty."""
        found = self.prepared.sources.get(source)
        file = found.files.get(part) if found is not None else None
        return f"runs:/{self.run_id}/{DATA_FOLDER}/{file}" if file is not None else None
