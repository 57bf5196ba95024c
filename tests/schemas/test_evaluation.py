"""What an evaluation may be asked, and the means of what it finds."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from post_training.schemas.evaluation import EvaluationRequest, ExampleValues

CONFIG = {"dataset_id": "held-out.jsonl"}


def refusal(**fields: Any) -> tuple[tuple[int | str, ...], str]:
    body = {"models": {"base": "org/name"}, "config": CONFIG} | fields
    with pytest.raises(ValidationError) as caught:
        EvaluationRequest.model_validate(body)
    [error] = caught.value.errors()
    return error["loc"], error["msg"]


def test_a_small_request_is_enough() -> None:
    request = EvaluationRequest.model_validate({"models": {"base": "org/name"}, "config": CONFIG})
    assert request.config.exact_match is None
    assert request.config.preference_dataset_id is None


@pytest.mark.parametrize(
    ("config", "field", "rule"),
    [
        (
            {"exact_match": {"pattern": "("}},
            ("exact_match", "pattern"),
            "must be a regular expression: .*got '\\('",
        ),
        (
            {"exact_match": {"pattern": "x", "max_new_tokens": 0}},
            ("exact_match", "max_new_tokens"),
            "equal to 1",
        ),
        ({"beta": 0.0}, ("beta",), "greater than 0"),
        ({"max_examples": 0}, ("max_examples",), "equal to 1"),
        ({"metric": "bleu"}, ("metric",), "not permitted"),
        ({"max_bad_row_fraction": 1.0}, ("max_bad_row_fraction",), "less than 1"),
    ],
)
def test_what_means_nothing_is_refused(config: dict[str, Any], field: tuple[str, ...], rule: str) -> None:
    loc, message = refusal(config=CONFIG | config)
    assert loc == ("config", *field)
    assert re.search(rule, message)


@pytest.mark.parametrize("models", [{}, {"no/slash": "x"}, {"empty": ""}, {str(i): "x" for i in range(9)}])
def test_models_have_names_that_metrics_can_carry(models: dict[str, str]) -> None:
    loc, _ = refusal(models=models)
    assert loc == () or loc[0] == "models"


def test_means_are_over_tokens_rows_and_pairs() -> None:
    values = ExampleValues(
        nll=[2.0, 4.0], tokens=[1, 5], correct=[True, False, False, True], reward_margin=[0.5, -0.25, 0.0]
    )
    metrics = values.metrics()
    assert metrics["loss"] == 1.0  # 6 nats of 6 tokens
    assert metrics["perplexity"] == pytest.approx(math.e)
    assert metrics["exact_match"] == 0.5
    assert metrics["reward_accuracy"] == pytest.approx(1 / 3)
    assert metrics["reward_margin"] == pytest.approx(0.25 / 3)


def test_what_was_not_measured_has_no_metric() -> None:
    assert ExampleValues(nll=[1.0], tokens=[1]).metrics().keys() == {"loss", "perplexity"}


def test_an_endless_perplexity_is_a_number() -> None:
    assert math.isfinite(ExampleValues(nll=[9e3], tokens=[1]).metrics()["perplexity"])
