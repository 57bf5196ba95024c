"""What the trigger form says beside a field."""

from __future__ import annotations

from typing import Any

import pytest

from post_training.operators.params import range_of, request_params
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"minimum": 1, "maximum": 2**31 - 1}, "At least 1."),
        ({"exclusiveMinimum": 0, "maximum": 1}, "Above 0, at most 1."),
        ({"minimum": 0, "exclusiveMaximum": 1}, "At least 0, below 1."),
        ({"minimum": 1, "maximum": 1}, "Only 1."),
        ({"minimum": 0, "exclusiveMaximum": 2**32}, "At least 0."),
        ({"exclusiveMinimum": 1e-8}, "Above 1e-08."),
        ({"type": "string", "minLength": 1}, ""),
    ],
)
def test_a_range_is_a_sentence(schema: dict[str, Any], sentence: str) -> None:
    assert range_of(schema) == sentence


def test_an_empty_field_says_what_is_taken_for_it() -> None:
    params = request_params(SupervisedFineTuneRequest)
    described = {path: param.description or "" for path, param in params.items()}
    assert described["runtime.max_seq_length"].endswith(
        "At least 8. Empty takes the deployment's, which is 2048 unless it says otherwise."
    )
    assert "Empty" not in described["runtime.save_total_limit"], "its null is a value"
    assert "Empty" not in described["runtime.adapter.use_dora"], "it belongs to adapters that are said"
    assert "Empty" not in described["training_config.n_epochs"]


def test_a_field_tells_its_range() -> None:
    params = request_params(PreferenceOptimizeRequest)
    assert (params["algorithm_config.gamma"].description or "").endswith("1 is none. Above 0, at most 1.")
