"""What a gate may ask, and what a decision tells."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from post_training.schemas import evaluation
from post_training.schemas.evaluation import ExampleValues
from post_training.schemas.gates import DIRECTION, Decision, Gate, GateOutcome, GatesConfig, Metric

NAMES = {value for name, value in vars(evaluation).items() if name.startswith("METRIC_")}


def refusal(**fields: Any) -> tuple[tuple[int | str, ...], str, Any]:
    """Return the field of the only error, its sentence, and the value that it is about."""
    with pytest.raises(ValidationError) as caught:
        GatesConfig.model_validate({"gates": [{"metric": "loss"} | fields]})
    [error] = caught.value.errors()
    assert error["loc"][:2] == ("gates", 0)
    return error["loc"][2:], error["msg"], error["input"]


def test_every_metric_of_an_evaluation_has_a_direction() -> None:
    measured = ExampleValues(nll=[1.0], tokens=[1], correct=[True], reward_margin=[1.0]).metrics()
    assert set(DIRECTION) == set(measured) == set(get_args(Metric)) == NAMES


def test_the_losses_are_better_when_lower() -> None:
    assert {metric for metric, better in DIRECTION.items() if better == "lower"} == {"loss", "perplexity"}
    assert set(DIRECTION.values()) == {"lower", "higher"}


def test_without_a_word_the_loss_must_be_surely_no_worse() -> None:
    config = GatesConfig()
    [gate] = config.gates
    assert gate == Gate(metric="loss", against="champion", min_improvement=0.0, confidence=0.95)
    assert (config.bootstrap_resamples, config.seed) == (2000, 0)
    assert GatesConfig().gates is not config.gates


def test_a_confidence_alone_asks_for_no_loss() -> None:
    assert Gate(metric="loss", confidence=0.9).min_improvement == 0.0
    assert Gate(metric="loss", confidence=0.9, against="base").min_improvement == 0.0
    assert Gate(metric="loss", confidence=0.9, min_relative_improvement=0.1).min_improvement is None


@pytest.mark.parametrize(
    ("fields", "compares"),
    [
        ({"at_most": 3.0}, False),
        ({"at_least": 1.0, "at_most": 1.0}, False),
        ({"min_improvement": -0.5}, True),
        ({"min_relative_improvement": -0.5, "against": "base"}, True),
        ({"min_improvement": 0, "min_relative_improvement": 0.1, "confidence": 0.9, "at_most": 3}, True),
    ],
)
def test_what_a_gate_may_ask_reads_back_as_it_was(fields: dict[str, Any], compares: bool) -> None:
    gate = Gate.model_validate({"metric": "loss", **fields})
    assert gate.compares is compares
    assert Gate.model_validate(gate.model_dump()) == gate
    assert Gate.model_validate_json(gate.model_dump_json()) == gate


@pytest.mark.parametrize(
    ("fields", "field", "rule", "value"),
    [
        ({"metric": "bleu"}, "metric", ".*".join(get_args(Metric)), "bleu"),
        ({"at_most": 3.0, "against": "teacher"}, "against", "'champion' or 'base'", "teacher"),
        ({"min_improvement": float("nan")}, "min_improvement", "finite", None),
        ({"at_least": float("inf")}, "at_least", "finite", float("inf")),
        ({"at_most": "3"}, "at_most", "valid number", "3"),
        ({"min_relative_improvement": -1.0}, "min_relative_improvement", "greater than -1", -1.0),
        ({"confidence": 0.5}, "confidence", "greater than 0.5", 0.5),
        ({"confidence": 1.0}, "confidence", "less than 1", 1.0),
        ({"max_loss": 3.0, "confidence": 0.9}, "max_loss", "not permitted", 3.0),
        ({"at_least": 2.0, "at_most": 1.0}, "at_most", r"at_least, 2\.0, got 1\.0", 1.0),
        ({"at_most": 3.0, "confidence": 0.9}, "confidence", r"set min_improvement.*got 0\.9", 0.9),
        ({"at_least": 3.0, "confidence": 0.9}, "confidence", r"set min_improvement.*got 0\.9", 0.9),
        ({"at_most": 3.0, "against": "base"}, "against", "is not compared with.*got 'base'", "base"),
    ],
)
def test_what_a_gate_may_not_ask(fields: dict[str, Any], field: str, rule: str, value: Any) -> None:
    loc, message, given = refusal(**fields)
    assert loc == (field,)
    assert re.search(rule, message)
    assert value is None or given == value  # NaN equals nothing


def test_a_gate_asks_something() -> None:
    loc, message, given = refusal()
    assert loc == ()
    assert re.search("set min_improvement.* or at_most, got metric 'loss' alone", message)
    assert given == {"metric": "loss"}


@pytest.mark.parametrize("name", ["min_improvement", "min_relative_improvement"])
def test_a_minimum_of_the_wrong_type_is_one_error(name: str) -> None:
    loc, _, given = refusal(**{name: "much"}, confidence=0.9, at_most=3.0, against="base")
    assert (loc, given) == ((name,), "much")


@pytest.mark.parametrize(
    ("fields", "field", "rule", "value"),
    [
        ({"gates": []}, "gates", "at least 1", []),
        ({"gates": [{"metric": "loss", "at_most": 3.0}] * 21}, "gates", "at most 20", None),
        ({"bootstrap_resamples": 99}, "bootstrap_resamples", "equal to 100", 99),
        ({"bootstrap_resamples": 100_001}, "bootstrap_resamples", "equal to 100000", 100_001),
        ({"seed": -1}, "seed", "equal to 0", -1),
        ({"seed": 2**32}, "seed", "less than 4294967296", 2**32),
        (
            {"gates": [{"metric": "loss", "confidence": 0.9999}]},
            "bootstrap_resamples",
            r"too few to show a confidence of 0\.9999, got 2000",
            2000,
        ),
    ],
)
def test_what_a_configuration_may_not_say(fields: dict[str, Any], field: str, rule: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        GatesConfig.model_validate(fields)
    [error] = caught.value.errors()
    assert error["loc"] == (field,)
    assert re.search(rule, error["msg"])
    assert value is None or error["input"] == value


def test_more_resamples_show_more_confidence() -> None:
    gates = [{"metric": "loss", "confidence": 0.9999}]
    config = GatesConfig.model_validate({"gates": gates, "bootstrap_resamples": 20_000})
    assert config.gates[0].confidence == 0.9999


def test_a_decision_is_a_table_too() -> None:
    compared = GateOutcome(
        gate=Gate(metric="loss", confidence=0.9),
        passed=False,
        candidate=2.0,
        other=1.0,
        improvement=-1.0,
        lower_bound=-1.5,
        relative_improvement=-1.0,
        relative_lower_bound=-1.25,
        sentence="worse.",
    )
    bounded = GateOutcome(
        gate=Gate(metric="exact_match", at_least=0.5), passed=True, candidate=0.75, sentence="well."
    )
    columns, rows = Decision(accepted=False, reason="worse.", outcomes=[compared, bounded]).table()
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {
            "metric": "loss",
            "against": "champion",
            "passed": False,
            "candidate": 2.0,
            "other": 1.0,
            "improvement": -1.0,
            "lower_bound": -1.5,
            "relative_improvement": -1.0,
            "relative_lower_bound": -1.25,
            "sentence": "worse.",
        },
        {
            "metric": "exact_match",
            "against": None,
            "passed": True,
            "candidate": 0.75,
            "other": None,
            "improvement": None,
            "lower_bound": None,
            "relative_improvement": None,
            "relative_lower_bound": None,
            "sentence": "well.",
        },
    ]


def test_a_decision_is_json_whatever_was_measured() -> None:
    outcome = GateOutcome(
        gate=Gate(metric="loss", at_most=3.0), passed=False, candidate=float("nan"), sentence="no number."
    )
    decision = Decision(accepted=False, reason="no number.", outcomes=[outcome])
    assert Decision.model_validate_json(decision.model_dump_json()) == decision
    assert decision.outcomes[0].candidate is None
