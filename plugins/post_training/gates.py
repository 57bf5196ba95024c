"""One pure function that decides from an evaluation's values whether a candidate replaces the champion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from post_training.errors import DataError, InvalidRequestError
from post_training.schemas.evaluation import MAX_LOSS, EvaluationValues, ExampleValues
from post_training.schemas.gates import DIRECTION, Decision, Gate, GateOutcome, GatesConfig, Metric

CANDIDATE, CHAMPION, BASE = "candidate", "champion", "base"
"""What the models are called in the evaluation."""

RESAMPLED_VALUES = 2**21
"""Values of each series that are resampled at a time: about 100 MB in all, whatever the evaluation's size."""

TINY = 1e-12
"""What a resample's value of 0 is taken for where a fraction of it is formed."""

_OWNERS = {CANDIDATE: "the candidate's", CHAMPION: "the champion's", BASE: "the base model's"}

Series = tuple[Sequence[float], Sequence[int]]
"""A value and a weight for each example; a metric is the sum of the values over the sum of the weights."""


def _each(values: Sequence[float]) -> Series:
    return values, [1] * len(values)


def _preferred(margin: float) -> float:
    """Return whether the chosen answer has the larger reward; what is not finite stays what it is."""
    return float(margin > 0) if math.isfinite(margin) else margin


class _Measure(NamedTuple):
    """Where a metric comes from.

    :param needs: what is to be set for it to be measured.
    """

    series: Callable[[ExampleValues], Series]
    needs: str


_ROWS = _Measure(lambda values: (values.nll, values.tokens), "rows of the evaluation's dataset_id")

_MEASURES: Mapping[Metric, _Measure] = {
    "loss": _ROWS,
    "perplexity": _ROWS,
    "exact_match": _Measure(lambda values: _each(values.correct), "the evaluation's exact_match"),
    "reward_accuracy": _Measure(
        lambda values: _each([_preferred(margin) for margin in values.reward_margin]),
        "the evaluation's preference_dataset_id",
    ),
    "reward_margin": _Measure(
        lambda values: _each(values.reward_margin), "the evaluation's preference_dataset_id"
    ),
}


@dataclass(frozen=True)
class _Measured:
    """One model's metric, and the examples that it comes from."""

    role: str
    value: float
    series: Series

    @property
    def is_finite(self) -> bool:
        """Whether it says anything; a perplexity that is cut off and a share hide what is not finite."""
        return math.isfinite(self.value) and all(map(math.isfinite, self.series[0]))


class _Check(NamedTuple):
    """One condition, and how a sentence that began with metric and value goes on."""

    holds: bool
    text: str


class _Improvement(NamedTuple):
    """By how much the candidate is better, positive is better; the fields are those of ``GateOutcome``."""

    improvement: float | None = None
    lower_bound: float | None = None
    relative_improvement: float | None = None
    relative_lower_bound: float | None = None


def decide(config: GatesConfig, values: EvaluationValues) -> Decision:
    """Hold every gate against the values of the models ``candidate``, ``champion`` and ``base``.

    Without a champion nothing is compared with one: of such a gate the bounds alone must hold. A value
    that is not finite never passes, and neither does a confidence that the examples are too few for.

    :raises InvalidRequestError: if a gate needs a metric, a model or a library that is not there.
    :raises DataError: if there is no candidate, or the models were not measured on the same examples.
    """
    outcomes = [
        _outcome(f"config.gates.{number}", gate, config, values.models)
        for number, gate in enumerate(config.gates)
    ]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    reason = "; ".join(outcome.sentence.removesuffix(".") for outcome in failed or outcomes)
    return Decision(accepted=not failed, reason=f"{reason}.", outcomes=outcomes)


def _outcome(path: str, gate: Gate, config: GatesConfig, models: Mapping[str, ExampleValues]) -> GateOutcome:
    candidate = _measured(path, gate, CANDIDATE, models)
    other = None
    if gate.compares and (gate.against in models or gate.against == BASE):
        other = _measured(path, gate, gate.against, models)

    def outcome(passed: bool, sentence: str, found: _Improvement) -> GateOutcome:
        other_value = None if other is None else other.value
        values = {"candidate": candidate.value, "other": other_value, **found._asdict()}
        return GateOutcome(gate=gate, passed=passed, sentence=sentence, **values)

    for measured in (candidate, other):
        if measured is not None and not measured.is_finite:
            sentence = f"{_OWNERS[measured.role]} {gate.metric} does not come from finite numbers."
            return outcome(False, sentence, _Improvement())
    found = _Improvement() if other is None else _compare(path, gate, config, candidate, other)
    checks = [*_comparison(gate, found, other), *_limits(gate, candidate.value)]
    failed = [check.text for check in checks if not check.holds]
    text = " and".join(failed) or "".join(check.text for check in checks)
    return outcome(not failed, f"{gate.metric} {_number(candidate.value)}{text}.", found)


def _measured(path: str, gate: Gate, role: str, models: Mapping[str, ExampleValues]) -> _Measured:
    """Return what was measured of a model.

    :raises InvalidRequestError: if nothing was.
    :raises DataError: if it is the candidate that is missing.
    """
    if role not in models:
        if role == CANDIDATE:
            raise DataError("the evaluation has no values of the candidate")
        raise InvalidRequestError.of(
            f"{path}.against", f"must be one of the evaluated models, {', '.join(models)}, got {role!r}"
        )
    measure, metrics = _MEASURES[gate.metric], models[role].metrics()
    if gate.metric not in metrics:
        raise InvalidRequestError.of(
            f"{path}.metric",
            f"must be measured of the {role}, which needs {measure.needs}, got {gate.metric!r}",
        )
    return _Measured(role, metrics[gate.metric], measure.series(models[role]))


def _compare(
    path: str, gate: Gate, config: GatesConfig, candidate: _Measured, other: _Measured
) -> _Improvement:
    """Return by how much the candidate is better, and the bounds if the gate's confidence can be had.

    :raises DataError: if the two were not measured on the same examples.
    """
    counts = {len(numbers) for measured in (candidate, other) for numbers in measured.series}
    if len(counts) > 1:
        raise DataError(
            f"candidate and {other.role} were not measured on the same examples:"
            f" their {gate.metric} comes from {' and '.join(map(str, sorted(counts)))}"
        )
    improvement = _improvement(gate.metric, candidate.value, other.value)
    found = _Improvement(
        improvement, relative_improvement=improvement / abs(other.value) if other.value else None
    )
    if gate.confidence is None or min(counts) < _examples_for(gate.confidence):
        return found
    absolute, relative = _lower_bounds(path, gate, config, candidate.series, other.series)
    return found._replace(lower_bound=absolute, relative_lower_bound=relative if other.value else None)


def _improvement(metric: Metric, candidate: Any, other: Any) -> Any:
    """Subtract numbers or arrays so that positive is better."""
    return other - candidate if DIRECTION[metric] == "lower" else candidate - other


def _examples_for(confidence: float) -> int:
    """Return how many examples a confidence takes at least.

    As many as all favour one of two equal models with no more than the error's probability; below that
    every bootstrap is surer than its data (one example has no spread at all).
    """
    return math.ceil(-math.log2(1 - confidence))


def _lower_bounds(
    path: str, gate: Gate, config: GatesConfig, candidate: Series, other: Series
) -> tuple[float, float]:
    """Return the one-sided lower bounds of the improvement and of the relative improvement.

    Paired bootstrap: each resample draws examples, the same ones for both models, and forms the metrics of
    it as ``ExampleValues.metrics`` does, sum over sum. The bound is the distribution's percentile: it
    reaches a minimum where that share of the resamples does, which is the rule of Koehn, "Statistical
    Significance Tests for Machine Translation Evaluation" (EMNLP 2004). Percentile, not BCa (both: Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 14): BCa leaves each example out
    once, quadratic in their number, and has no value where all differences are equal.

    :raises InvalidRequestError: if scipy is not installed.
    """
    try:
        import numpy as np  # noqa: PLC0415 - the bare install does without
        from scipy.stats import bootstrap  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError:
        raise InvalidRequestError.of(
            f"{path}.confidence", f"needs scipy, of the extra 'search', got {gate.confidence}", "missing"
        ) from None

    def metric_of(values: Any, weights: Any) -> Any:
        mean = values.sum(axis=-1) / weights.sum(axis=-1)
        return np.exp(np.minimum(mean, MAX_LOSS)) if gate.metric == "perplexity" else mean

    def improvements(values: Any, weights: Any, other_values: Any, other_weights: Any, axis: int) -> Any:
        theirs = metric_of(other_values, other_weights)
        improvement = _improvement(gate.metric, metric_of(values, weights), theirs)
        return np.stack([improvement, improvement / np.maximum(np.abs(theirs), TINY)])

    data = [np.asarray(numbers, dtype=float) for numbers in (*candidate, *other)]
    result = bootstrap(
        data,
        improvements,
        n_resamples=config.bootstrap_resamples,
        batch=max(1, RESAMPLED_VALUES // len(data[0])),
        vectorized=True,
        paired=True,
        confidence_level=gate.confidence,
        alternative="greater",
        method="percentile",
        rng=np.random.default_rng(config.seed),
    )
    absolute, relative = result.confidence_interval.low
    return float(absolute), float(relative)


def _comparison(gate: Gate, found: _Improvement, other: _Measured | None) -> Iterator[_Check]:
    """Hold the minima against an improvement, or against its bound where the gate has a confidence."""
    if not gate.compares:
        return
    if other is None:
        yield _Check(True, " (there is no champion yet)")
        return
    if gate.confidence is not None and found.lower_bound is None:
        needed, count = _examples_for(gate.confidence), len(other.series[0])
        yield _Check(
            False, f" comes from {count} examples, too few for {_percent(gate.confidence)}: {needed}"
        )
        return
    named = f"{_OWNERS[other.role]} {_number(other.value)}"
    missed = list(_missed(gate, found))
    if missed:
        yield _Check(False, f" is not better than {named} by at least {' and '.join(missed)}")
    if gate.min_relative_improvement is not None and found.relative_improvement is None:
        yield _Check(False, f" cannot be a fraction better than {named}: ask for min_improvement")
    yield _Check(True, f" instead of {named}")


def _missed(gate: Gate, found: _Improvement) -> Iterator[str]:
    """Say which minima are not reached, each with the bound that does not reach it."""
    for minimum, improvement, bound, text in (
        (gate.min_improvement, found.improvement, found.lower_bound, _number),
        (gate.min_relative_improvement, found.relative_improvement, found.relative_lower_bound, _percent),
    ):
        reached = improvement if gate.confidence is None else bound
        if minimum is not None and reached is not None and not _reaches(reached, minimum):
            note = ""
            if gate.confidence is not None:
                note = f" ({_percent(gate.confidence)} lower bound of the improvement: {text(reached)})"
            yield f"{text(minimum)}{note}"


def _limits(gate: Gate, value: float) -> Iterator[_Check]:
    """Hold the candidate's own value against the gate's bounds."""
    if gate.at_least is not None:
        holds, limit = _reaches(value, gate.at_least), _number(gate.at_least)
        yield _Check(holds, f", at least {limit}" if holds else f" is below {limit}")
    if gate.at_most is not None:
        holds, limit = _reaches(gate.at_most, value), _number(gate.at_most)
        yield _Check(holds, f", at most {limit}" if holds else f" is above {limit}")


def _reaches(value: float, minimum: float) -> bool:
    """Compare, but for rounding: 0.3 is better than 0.2 by at least 0.1."""
    return value >= minimum or math.isclose(value, minimum, rel_tol=1e-9, abs_tol=1e-12)


def _number(value: float) -> str:
    return f"{value:.5g}"


def _percent(fraction: float) -> str:
    return f"{_number(100 * fraction)} %"
