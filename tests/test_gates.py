"""When a candidate takes the champion's place, and how sure that is."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from post_training import gates
from post_training.errors import DataError, InvalidRequestError
from post_training.gates import decide
from post_training.schemas.evaluation import EvaluationValues, ExampleValues
from post_training.schemas.gates import DIRECTION, Decision, GatesConfig, Metric

METRICS = get_args(Metric)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def decided(*gate: dict[str, Any], resamples: int = 2000, seed: int = 0, **models: ExampleValues) -> Decision:
    config = GatesConfig.model_validate({"gates": list(gate), "bootstrap_resamples": resamples, "seed": seed})
    return decide(config, EvaluationValues(models=models))


def losing(*nll: float, tokens: int = 1) -> ExampleValues:
    return ExampleValues(nll=list(nll), tokens=[tokens] * len(nll))


def answering(*correct: int) -> ExampleValues:
    return ExampleValues(correct=[bool(right) for right in correct])


def preferring(*margins: float) -> ExampleValues:
    return ExampleValues(reward_margin=list(margins))


def drawn(seed: int, count: int, better: float = 0.0) -> ExampleValues:
    """Draw a model's values; the same seed has the same examples, better ones where better is positive."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 50, count)
    nll = tokens * rng.gamma(4, 0.5, count) * math.exp(-better)
    return ExampleValues(
        nll=nll.tolist(),
        tokens=tokens.tolist(),
        correct=(rng.random(count) < 0.5 + better).tolist(),
        reward_margin=rng.normal(0.1 + better, 1, count).tolist(),
    )


BETTER: Mapping[str, tuple[ExampleValues, ExampleValues]] = {
    "loss": (losing(1.0, 1.5), losing(1.5, 2.0)),
    "perplexity": (losing(1.0, 1.5), losing(1.5, 2.0)),
    "exact_match": (answering(1, 1, 0), answering(1, 0, 0)),
    "reward_accuracy": (preferring(0.1, 0.2), preferring(9.0, -0.2)),
    "reward_margin": (preferring(9.0, -0.2), preferring(0.1, 0.2)),
}
"""A better and a worse model by each metric."""


@pytest.mark.parametrize("metric", METRICS)
def test_the_better_model_is_accepted_and_the_worse_one_is_not(metric: str) -> None:
    better, worse = BETTER[metric]
    gate = {"metric": metric, "min_improvement": 0.01}
    forward = decided(gate, candidate=better, champion=worse)
    backward = decided(gate, candidate=worse, champion=better)
    assert (forward.accepted, backward.accepted) == (True, False)
    gain = abs(better.metrics()[metric] - worse.metrics()[metric])
    assert forward.outcomes[0].improvement == pytest.approx(gain)
    assert backward.outcomes[0].improvement == pytest.approx(-gain)


def test_an_improvement_is_a_difference_and_a_fraction_of_the_others_value() -> None:
    [outcome] = decided(
        {"metric": "loss", "min_improvement": 0.5}, candidate=losing(1.0, 2.0), champion=losing(2.0, 2.0)
    ).outcomes
    assert (outcome.candidate, outcome.other) == (1.5, 2.0)
    assert (outcome.improvement, outcome.relative_improvement) == (0.5, 0.25)
    assert (outcome.lower_bound, outcome.relative_lower_bound) == (None, None)


def test_a_fraction_is_of_the_size_of_a_negative_value() -> None:
    [outcome] = decided(
        {"metric": "reward_margin", "min_relative_improvement": 0.5},
        candidate=preferring(-1.0),
        champion=preferring(-2.0),
    ).outcomes
    assert (outcome.passed, outcome.relative_improvement) == (True, 0.5)


@pytest.mark.parametrize(
    ("gate", "accepted"),
    [
        ({"min_improvement": 0.5}, True),
        ({"min_improvement": 0.51}, False),
        ({"min_relative_improvement": 0.25}, True),
        ({"min_relative_improvement": 0.26}, False),
        ({"min_improvement": 0.5, "min_relative_improvement": 0.26}, False),
        ({"min_improvement": 0.51, "min_relative_improvement": 0.25}, False),
        ({"at_most": 1.5}, True),
        ({"at_most": 1.49}, False),
        ({"at_least": 1.5}, True),
        ({"at_least": 1.51}, False),
        ({"min_improvement": 0.5, "at_most": 1.0}, False),
        ({"min_improvement": 0.6, "at_most": 2.0}, False),
    ],
)
def test_all_that_a_gate_asks_must_hold(gate: dict[str, float], accepted: bool) -> None:
    models = {"candidate": losing(1.0, 2.0), "champion": losing(2.0, 2.0)}
    assert decided({"metric": "loss"} | gate, **models).accepted is accepted


def test_a_negative_minimum_allows_that_much_loss() -> None:
    models = {"candidate": losing(2.0), "champion": losing(1.75)}
    assert decided({"metric": "loss", "min_improvement": -0.25}, **models).accepted
    assert not decided({"metric": "loss", "min_improvement": -0.2}, **models).accepted
    assert decided({"metric": "loss", "min_relative_improvement": -0.15}, **models).accepted
    assert not decided({"metric": "loss", "min_relative_improvement": -0.14}, **models).accepted


def test_rounding_decides_nothing() -> None:
    """0.3 - 0.2 is a little less than 0.1."""
    three, two = answering(*[1] * 3, *[0] * 7), answering(*[1] * 2, *[0] * 8)
    gate = {"metric": "exact_match", "min_improvement": 0.1}
    assert decided(gate, candidate=three, champion=two).accepted


def test_every_gate_must_hold() -> None:
    gates = [{"metric": "loss", "at_most": 3.0}, {"metric": "exact_match", "at_least": 0.5}]
    good = ExampleValues(nll=[2.0], tokens=[1], correct=[True])
    bad = good.model_copy(update={"correct": [False]})
    assert decided(*gates, candidate=good).accepted
    decision = decided(*gates, candidate=bad)
    assert not decision.accepted
    assert [outcome.passed for outcome in decision.outcomes] == [True, False]


@pytest.mark.parametrize(
    ("gate", "candidate", "others", "reason"),
    [
        (
            {"metric": "loss", "min_improvement": 0},
            losing(1.512),
            {"champion": losing(1.498)},
            "loss 1.512 is not better than the champion's 1.498 by at least 0.",
        ),
        (
            {"metric": "loss", "min_relative_improvement": 0.05},
            losing(1.5),
            {"base": losing(1.4)},
            "loss 1.5 is not better than the base model's 1.4 by at least 5 %.",
        ),
        (
            {"metric": "loss", "min_improvement": 0.1, "min_relative_improvement": 0.05, "at_most": 1},
            losing(1.5),
            {"champion": losing(1.5)},
            "loss 1.5 is not better than the champion's 1.5 by at least 0.1 and 5 % and is above 1.",
        ),
        (
            {"metric": "loss", "min_improvement": 0, "at_most": 2, "at_least": 0.5},
            losing(1.41),
            {"champion": losing(1.52)},
            "loss 1.41 instead of the champion's 1.52, at least 0.5, at most 2.",
        ),
        (
            {"metric": "loss", "min_improvement": 0, "at_most": 2},
            losing(1.41),
            {},
            "loss 1.41 (there is no champion yet), at most 2.",
        ),
        (
            {"metric": "loss", "confidence": 0.95, "min_improvement": 0.5, "min_relative_improvement": 0.3},
            losing(*[1.5] * 8),
            {"champion": losing(*[1.75] * 8)},
            "loss 1.5 is not better than the champion's 1.75 by at least"
            " 0.5 (95 % lower bound of the improvement: 0.25)"
            " and 30 % (95 % lower bound of the improvement: 14.286 %).",
        ),
        (
            {"metric": "exact_match", "at_least": 0.9},
            answering(1, 0),
            {},
            "exact_match 0.5 is below 0.9.",
        ),
        (
            {"metric": "exact_match", "min_relative_improvement": 0.1},
            answering(1, 0),
            {"champion": answering(0, 0)},
            "exact_match 0.5 cannot be a fraction better than the champion's 0: ask for min_improvement.",
        ),
    ],
)
def test_the_reason_is_a_sentence(
    gate: dict[str, Any], candidate: ExampleValues, others: dict[str, ExampleValues], reason: str
) -> None:
    against = {} if "base" not in others else {"against": "base"}
    decision = decided(gate | against, candidate=candidate, **others)
    assert decision.reason == reason
    assert [outcome.sentence for outcome in decision.outcomes] == [reason]


def test_a_rejection_names_what_failed_and_an_acceptance_what_was_reached() -> None:
    models = {
        "candidate": ExampleValues(nll=[1.5], tokens=[1], correct=[True], reward_margin=[-1.0]),
    }
    limits = [{"metric": "loss", "at_most": 1}, {"metric": "exact_match", "at_least": 1}]
    decision = decided(*limits, {"metric": "reward_margin", "at_least": 0}, **models)
    assert decision.reason == "loss 1.5 is above 1; reward_margin -1 is below 0."
    decision = decided({"metric": "loss", "at_most": 2}, limits[1], **models)
    assert decision.reason == "loss 1.5, at most 2; exact_match 1, at least 1."


def test_without_a_champion_bounds_and_the_base_still_hold() -> None:
    models = {"candidate": losing(2.0), "base": losing(3.0)}
    for_champion = {"metric": "loss", "min_improvement": 9.0, "confidence": 0.95}
    assert decided(for_champion, **models).accepted
    assert not decided(for_champion | {"at_most": 1.9}, **models).accepted
    assert decided(
        for_champion, {"metric": "loss", "against": "base", "min_improvement": 1}, **models
    ).accepted
    decision = decided(for_champion, {"metric": "loss", "against": "base", "min_improvement": 1.1}, **models)
    assert [outcome.passed for outcome in decision.outcomes] == [True, False]
    assert [outcome.other for outcome in decision.outcomes] == [None, 3.0]


def test_the_base_is_not_the_champion() -> None:
    models = {"candidate": losing(2.0), "champion": losing(1.0), "base": losing(3.0)}
    assert decided({"metric": "loss", "min_improvement": 0, "against": "base"}, **models).accepted
    assert not decided({"metric": "loss", "min_improvement": 0}, **models).accepted


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_that_was_not_measured_is_an_error(metric: str) -> None:
    fine = {"metric": "loss", "at_most": 9.0}
    full, empty = drawn(0, 3), losing(1.0, 1.0, 1.0) if metric not in ("loss", "perplexity") else answering(1)
    config = {"loss": "dataset_id", "perplexity": "dataset_id", "exact_match": "exact_match"}
    needed = config.get(metric, "preference_dataset_id")
    for models, role in (
        ({"candidate": empty, "champion": full}, "candidate"),
        ({"candidate": full, "champion": empty}, "champion"),
    ):
        first = [] if role == "candidate" and needed == "dataset_id" else [fine]
        with pytest.raises(InvalidRequestError) as caught:
            decided(*first, {"metric": metric, "min_improvement": 0}, **models)
        [error] = caught.value.errors
        assert error["loc"] == ["config", "gates", str(len(first)), "metric"]
        assert re.search(f"of the {role}.*evaluation's {needed}, got '{metric}'", error["msg"])


def test_a_base_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decided(
            {"metric": "loss", "min_improvement": 0, "against": "base"},
            candidate=losing(1.0),
            champion=losing(1.0),
        )
    [error] = caught.value.errors
    assert error["loc"] == ["config", "gates", "0", "against"]
    assert error["msg"] == "must be one of the evaluated models, candidate, champion, got 'base'"


def test_there_is_a_candidate() -> None:
    with pytest.raises(DataError, match="no values of the candidate"):
        decided({"metric": "loss", "at_most": 1}, champion=losing(1.0))


@pytest.mark.parametrize("confidence", [None, 0.95])
@pytest.mark.parametrize(
    ("metric", "candidate", "champion"),
    [
        ("loss", losing(*[1.0] * 6), losing(*[1.0] * 7)),
        ("exact_match", answering(*[1] * 6), answering(*[1] * 7)),
        ("reward_margin", preferring(*[1.0] * 6), preferring(*[1.0] * 7)),
    ],
)
def test_models_are_compared_on_the_same_examples(
    metric: str, candidate: ExampleValues, champion: ExampleValues, confidence: float | None
) -> None:
    with pytest.raises(DataError, match=f"champion were not .* same examples.* {metric} comes from 6 and 7"):
        decided(
            {"metric": metric, "min_improvement": -9, "confidence": confidence},
            candidate=candidate,
            champion=champion,
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["candidate", "champion"])
@pytest.mark.parametrize("metric", ["loss", "perplexity", "reward_accuracy", "reward_margin"])
def test_what_is_not_finite_never_passes(metric: str, role: str, bad: float) -> None:
    """Perplexity is cut off and a share counts, so that theirs is a number nevertheless."""
    broken = ExampleValues(nll=[1.0, bad], tokens=[1, 1], reward_margin=[1.0, bad])
    whole = ExampleValues(nll=[1.0, 2.0], tokens=[1, 1], reward_margin=[1.0, 1.0])
    models = {"candidate": whole, "champion": whole, role: broken}
    for confidence in (None, 0.6):
        decision = decided({"metric": metric, "min_improvement": -1e308, "confidence": confidence}, **models)
        assert not decision.accepted
        assert decision.reason == f"the {role}'s {metric} does not come from finite numbers."
        assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_a_candidate_that_is_not_finite_fails_its_bounds_too() -> None:
    assert not decided({"metric": "perplexity", "at_least": 0}, candidate=losing(math.inf)).accepted
    assert not decided({"metric": "loss", "at_least": 0}, candidate=losing(1e308, 1e308)).accepted


def test_endless_perplexities_are_equal() -> None:
    gate = {"metric": "perplexity", "min_improvement": 1, "confidence": 0.95}
    models = {"candidate": losing(*[800.0] * 8), "champion": losing(*[900.0] * 8)}
    [outcome] = decided(gate, **models).outcomes
    assert (outcome.passed, outcome.improvement, outcome.lower_bound) == (False, 0.0, 0.0)


def test_a_tie_is_not_a_preference() -> None:
    gate = {"metric": "reward_accuracy", "min_improvement": 0.1, "confidence": 0.95}
    models = {"candidate": preferring(*[0.0] * 8), "champion": preferring(*[-1.0] * 8)}
    [outcome] = decided(gate, **models).outcomes
    assert (outcome.passed, outcome.improvement, outcome.lower_bound) == (False, 0.0, 0.0)


def test_a_fraction_of_nothing_is_told() -> None:
    """The reference's own rewards are all 0."""
    models = {"candidate": preferring(*[0.5] * 8), "base": preferring(*[0.0] * 8)}
    gate = {"metric": "reward_margin", "against": "base", "min_relative_improvement": 0.1}
    for confidence in (None, 0.95):
        [outcome] = decided(gate | {"confidence": confidence}, **models).outcomes
        assert not outcome.passed
        assert (outcome.relative_improvement, outcome.relative_lower_bound) == (None, None)
        assert "cannot be a fraction better than the base model's 0" in outcome.sentence
    assert decided({**gate, "min_relative_improvement": None, "confidence": 0.95}, **models).accepted


def resampled_bounds(
    metric: str, candidate: ExampleValues, other: ExampleValues, confidence: float, resamples: int
) -> tuple[float, float]:
    """Bootstrap as the words have it: draw examples, form both models' metrics, compare."""
    rng = np.random.default_rng(99)
    count = max(len(candidate.nll), len(candidate.correct), len(candidate.reward_margin))
    gains, fractions = [], []
    for _ in range(resamples):
        chosen = rng.integers(0, count, count)
        ours, theirs = (
            ExampleValues.model_construct(
                **{name: [numbers[i] for i in chosen] for name, numbers in model.model_dump().items()}
            ).metrics()[metric]
            for model in (candidate, other)
        )
        gain = (theirs - ours) if metric in ("loss", "perplexity") else (ours - theirs)
        gains.append(gain)
        fractions.append(gain / abs(theirs))
    low = 100 * (1 - confidence)
    return float(np.percentile(gains, low)), float(np.percentile(fractions, low))


@pytest.mark.parametrize("metric", METRICS)
def test_the_bounds_are_those_of_a_bootstrap_in_plain_words(metric: str) -> None:
    candidate, champion = drawn(1, 60, better=0.2), drawn(2, 60)
    expected = resampled_bounds(metric, candidate, champion, 0.9, 2000)
    [outcome] = decided(
        {"metric": metric, "min_improvement": 0, "confidence": 0.9},
        candidate=candidate,
        champion=champion,
        resamples=20_000,
    ).outcomes
    # The error of a percentile of 2000 draws is some hundredths of the distribution's width.
    for found, bound, wanted in (
        (outcome.improvement, outcome.lower_bound, expected[0]),
        (outcome.relative_improvement, outcome.relative_lower_bound, expected[1]),
    ):
        assert found is not None
        assert bound == pytest.approx(wanted, abs=0.1 * abs(found - wanted))


@pytest.mark.parametrize("confidence", [0.6, 0.9, 0.99])
def test_the_bound_of_a_mean_is_the_normal_distributions(confidence: float) -> None:
    rng = np.random.default_rng(3)
    theirs = rng.normal(0, 5, 4000)
    ours = theirs + rng.normal(0.1, 1, 4000)
    [outcome] = decided(
        {"metric": "reward_margin", "confidence": confidence},
        candidate=preferring(*ours),
        champion=preferring(*theirs),
        resamples=5000,
    ).outcomes
    differences = ours - theirs  # paired: of the 5 in each model's own spread nothing is left
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    expected = differences.mean() - norm.ppf(confidence) * error
    assert outcome.lower_bound == pytest.approx(expected, abs=0.1 * error)


def test_models_of_the_same_worth_are_rarely_taken_for_better() -> None:
    """At a confidence of 90 % about one in ten is; of 200 between 8 and 35 but for one time in 1000."""
    accepted = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        ours, theirs = rng.normal(0, 1, (2, 50))
        gate = {"metric": "reward_margin", "min_improvement": 0, "confidence": 0.9}
        models = {"candidate": preferring(*ours), "champion": preferring(*theirs)}
        accepted += decided(gate, resamples=200, **models).accepted
    assert 8 <= accepted <= 35


@pytest.mark.parametrize("metric", METRICS)
def test_identical_models_are_not_better_and_clearly_better_ones_are(metric: str) -> None:
    model = drawn(5, 300)
    gate = {"metric": metric, "min_improvement": 0.001, "confidence": 0.95}
    [same] = decided(gate, candidate=model, champion=model).outcomes
    assert (same.passed, same.lower_bound) == (False, 0.0)
    assert decided(gate | {"min_improvement": 0}, candidate=model, champion=model).accepted
    assert decided(gate, candidate=drawn(5, 300, better=0.4), champion=model).accepted
    assert not decided(gate, candidate=model, champion=drawn(5, 300, better=0.4)).accepted


def test_a_gain_that_chance_explains_is_no_gain() -> None:
    ours, theirs = drawn(11, 40), drawn(12, 40)
    if ours.metrics()["loss"] > theirs.metrics()["loss"]:
        ours, theirs = theirs, ours
    gate = {"metric": "loss", "min_improvement": 0}
    assert decided(gate, candidate=ours, champion=theirs).accepted
    decision = decided(gate | {"confidence": 0.95}, candidate=ours, champion=theirs)
    assert not decision.accepted
    assert re.search(r"by at least 0 \(95 % lower bound of the improvement: -0\.\d+\)\.$", decision.reason)


def test_a_relative_minimum_is_held_by_its_own_bound() -> None:
    """All of a hundred examples lose a tenth: the fraction is sure, the difference is not."""
    nll = np.random.default_rng(4).gamma(2, 1, 100)
    models = {"candidate": losing(*(0.9 * nll)), "champion": losing(*nll)}
    gate = {"metric": "loss", "confidence": 0.95, "min_relative_improvement": 0.1}
    [outcome] = decided(gate, **models).outcomes
    assert (outcome.passed, outcome.relative_lower_bound) == (True, pytest.approx(0.1))
    gain = 0.1 * float(nll.mean())
    assert outcome.lower_bound is not None
    assert outcome.lower_bound < 0.95 * gain
    assert not decided(gate | {"min_improvement": gain}, **models).accepted
    assert not decided(gate | {"min_relative_improvement": 0.101}, **models).accepted


def test_a_resample_without_a_right_answer_has_a_fraction() -> None:
    """Of ten rows with one right answer a third of the resamples have none."""
    models = {"candidate": answering(1, *[1] * 9), "champion": answering(1, *[0] * 9)}
    gate = {"metric": "exact_match", "min_relative_improvement": 0.5, "confidence": 0.95}
    [outcome] = decided(gate, **models).outcomes
    assert outcome.passed
    assert outcome.relative_lower_bound is not None
    assert 1 < outcome.relative_lower_bound < 9
    equal = {"candidate": models["champion"], "champion": models["champion"]}
    assert decided(gate, **equal).outcomes[0].relative_lower_bound == 0.0


@pytest.mark.parametrize("confidence", [None, 0.95])
def test_the_loss_is_over_tokens_not_over_rows(confidence: float | None) -> None:
    """Rows of one token got much worse, those of 991 better: rows would reject what tokens accept."""
    tokens = [1] * 30 + [991] * 30
    champion = ExampleValues(nll=[1.0] * 30 + [991.0] * 30, tokens=tokens)
    candidate = ExampleValues(nll=[9.0] * 30 + [700.0] * 30, tokens=tokens)

    def by_rows(model: ExampleValues) -> float:
        return float(np.mean(np.divide(model.nll, model.tokens)))

    assert by_rows(candidate) > by_rows(champion) + 3
    for metric in ("loss", "perplexity"):
        gate = {"metric": metric, "min_improvement": 0.2, "confidence": confidence}
        assert decided(gate, candidate=candidate, champion=champion).accepted
        assert not decided(gate, candidate=champion, champion=candidate).accepted


@pytest.mark.parametrize(
    ("confidence", "needed"), [(0.51, 2), (0.75, 2), (0.76, 3), (0.9, 4), (0.95, 5), (0.99, 7)]
)
def test_a_confidence_takes_examples(confidence: float, needed: int) -> None:
    """All of n examples favour one of two equal models with a probability of 2^-n."""
    assert 2**-needed <= 1 - confidence < 2 ** -(needed - 1)
    gate = {"metric": "loss", "confidence": confidence}
    for count in range(1, needed + 2):
        models = {"candidate": losing(*[1.0] * count), "champion": losing(*[2.0] * count)}
        [outcome] = decided(gate, **models).outcomes
        assert outcome.passed is (count >= needed)
        assert outcome.lower_bound == (1.0 if count >= needed else None)
        if count < needed:
            percent = f"{100 * confidence:g} %"
            assert outcome.sentence == f"loss 1 comes from {count} examples, too few for {percent}: {needed}."


def test_the_seed_decides_what_is_drawn() -> None:
    models = {"candidate": drawn(1, 50), "champion": drawn(2, 50)}
    gate = {"metric": "loss", "confidence": 0.9}
    first, again, other = (
        decided(gate, seed=seed, resamples=100, **models).outcomes[0].lower_bound for seed in (1, 1, 2)
    )
    assert first == again != other


def test_resamples_are_drawn_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are; and it changes nothing."""
    models = {"candidate": drawn(1, 50), "champion": drawn(2, 50)}
    gate = {"metric": "loss", "confidence": 0.9}
    whole = decided(gate, resamples=200, **models)
    largest = 0
    subtract = gates._improvement

    def watched(metric: Metric, candidate: Any, other: Any) -> Any:
        nonlocal largest
        largest = max(largest, np.size(candidate))
        return subtract(metric, candidate, other)

    monkeypatch.setattr(gates, "_improvement", watched)
    for values, batch in ((150, 3), (10, 1)):
        monkeypatch.setattr(gates, "RESAMPLED_VALUES", values)
        largest = 0
        assert decided(gate, resamples=200, **models) == whole
        assert largest == batch


def test_without_scipy_only_confidences_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    models = {"candidate": losing(*[1.0] * 8), "champion": losing(*[2.0] * 8)}
    plain = {"metric": "loss", "min_improvement": 0}
    assert decided(plain, **models).accepted
    with pytest.raises(InvalidRequestError) as caught:
        decided(plain, plain | {"confidence": 0.95}, **models)
    assert caught.value.errors == [
        {
            "loc": ["config", "gates", "1", "confidence"],
            "msg": "needs scipy, of the extra 'search', got 0.95",
            "type": "missing",
        }
    ]


def test_importing_it_loads_neither_numpy_nor_scipy() -> None:
    program = (
        "import json, sys; import post_training.gates;"
        "print(json.dumps([name for name in ('numpy', 'scipy') if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(gates.__file__).parents[1])},
    )
    assert json.loads(done.stdout) == []


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 50), st.floats(0, 50), st.integers(1, 100), st.booleans(), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    metric=st.sampled_from(METRICS),
    minimum=st.floats(-2, 2),
    confidence=st.sampled_from([None, 0.6, 0.95]),
)
def test_whatever_was_measured_is_decided_as_its_numbers_are(
    rows: list[tuple[float, float, int, bool, bool]],
    metric: Metric,
    minimum: float,
    confidence: float | None,
) -> None:
    ours, theirs, tokens, ours_right, theirs_right = map(list, zip(*rows, strict=True))
    candidate, champion = (
        ExampleValues(nll=nll, tokens=tokens, correct=right, reward_margin=[x - 25 for x in nll])
        for nll, right in ((ours, ours_right), (theirs, theirs_right))
    )
    gate = {"metric": metric, "min_improvement": minimum, "confidence": confidence}
    decision = decided(gate, candidate=candidate, champion=champion, resamples=100)
    [outcome] = decision.outcomes
    sign = -1 if DIRECTION[metric] == "lower" else 1
    gain = sign * (candidate.metrics()[metric] - champion.metrics()[metric])
    assert outcome.improvement == pytest.approx(gain)
    shown = outcome.improvement if confidence is None else outcome.lower_bound
    assert decision.accepted is outcome.passed
    if shown is None:
        assert len(rows) < 5
        assert not outcome.passed
    elif abs(shown - minimum) > 1e-6 * max(1, abs(shown)):  # nearer is rounding
        assert outcome.passed is (shown > minimum)
    assert decision.reason.endswith(".")
    assert Decision.model_validate_json(decision.model_dump_json()) == decision
