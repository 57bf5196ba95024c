"""How a retraining's data may be split."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from post_training.schemas.preparation import SplitConfig


def test_nothing_has_to_be_said() -> None:
    split = SplitConfig.model_validate({})
    assert (split.rows, split.validation_fraction, split.evaluation_fraction) == ("all", 0.05, 0.1)
    assert split.max_bad_row_fraction == 0


@pytest.mark.parametrize("part", ["validation_fraction", "evaluation_fraction"])
def test_a_part_may_be_empty(part: str) -> None:
    assert getattr(SplitConfig.model_validate({part: 0}), part) == 0


@pytest.mark.parametrize(
    ("fields", "loc", "rule"),
    [
        (
            {"validation_fraction": 0.5, "evaluation_fraction": 0.5},
            (),
            "validation_fraction and evaluation_fraction must be less than 1 together, got 0.5 and 0.5",
        ),
        ({"validation_fraction": -0.1}, ("validation_fraction",), "greater than or equal to 0"),
        ({"evaluation_fraction": 1.0}, ("evaluation_fraction",), "less than 1"),
        ({"max_bad_row_fraction": 1.0}, ("max_bad_row_fraction",), "less than 1"),
        ({"rows": "some"}, ("rows",), "'all' or 'new'"),
        ({"seed": 1}, ("seed",), "not permitted"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, Any], loc: tuple[str, ...], rule: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SplitConfig.model_validate(fields)
    [error] = caught.value.errors()
    assert error["loc"] == loc
    assert re.search(rule, error["msg"])
