"""The connection's defaults of the runtime block: for which jobs they hold."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from post_training.errors import InvalidRequestError
from post_training.operators.request import with_runtime_defaults
from post_training.schemas.requests import REQUESTS, AnyTrainingRequest
from post_training.schemas.training import RuntimeConfig
from tests.operators.conftest import connect
from tests.operators.workplace import KEY, PREFERENCE_KEY, Workplace
from tests.requests_of import LORA, QAT, dpo_body, sft_body

DEPLOYMENT = {"adapter": LORA, "reference_logprobs": "live", "export": "merged", "seed": 7}
DORA = LORA | {"use_dora": True}


def read(body: dict[str, Any]) -> AnyTrainingRequest:
    method = "preference_optimize" if "finetuned_model" in body else "supervised_fine_tune"
    return REQUESTS[method].model_validate(body)


@pytest.mark.parametrize(
    ("body", "defaults", "held"),
    [
        (dpo_body(), DEPLOYMENT, {"adapter", "reference_logprobs", "export", "seed"}),
        (sft_body(), DEPLOYMENT, {"export", "seed"}),
        (sft_body(algorithm_config=None), DEPLOYMENT, {"seed"}),
        (sft_body(algorithm_config=QAT), DEPLOYMENT, {"adapter", "seed"}),
        (sft_body(algorithm_config=QAT), {"adapter": DORA, "seed": 7}, {"seed"}),
        # Null says that there are no adapters; what only they give a meaning is left out with them.
        (dpo_body(runtime={"adapter": None}), DEPLOYMENT, {"adapter", "seed"}),
        (dpo_body(), {"export": "merged", "reference_logprobs": "live"}, None),
        (sft_body(), {"export": "adapter", "seed": 7}, {"seed"}),
        (dpo_body(), {}, None),
        (dpo_body(runtime={"scheduler": "linear"}), {"seed": 7}, {"scheduler", "seed"}),
    ],
)
def test_a_default_holds_where_it_means_something(
    body: dict[str, Any], defaults: dict[str, Any], held: set[str] | None
) -> None:
    runtime = with_runtime_defaults(read(body), defaults).runtime
    assert (runtime and runtime.model_fields_set) == held


def test_what_the_request_sets_is_kept() -> None:
    given = {"adapter": LORA | {"rank": 2}, "seed": 1, "export": "adapter"}
    runtime = with_runtime_defaults(read(dpo_body(runtime=given)), DEPLOYMENT).runtime
    assert runtime is not None
    assert runtime.adapter is not None
    assert (runtime.adapter.rank, runtime.seed, runtime.export) == (2, 1, "adapter")
    assert runtime.reference_logprobs == "live"


def test_null_adapters_stay_none() -> None:
    merged = with_runtime_defaults(read(dpo_body(runtime={"adapter": None})), DEPLOYMENT)
    assert merged.adapters is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"logger_config": {"log_model": False}}, r"logger_config\.log_model: needs a checkpoint_dir"),
        ({"runtime": RuntimeConfig(reference_logprobs="live")}, r"runtime\.reference_logprobs: .*'live'"),
    ],
)
def test_the_merged_request_is_validated_again(changes: dict[str, Any], sentence: str) -> None:
    broken = read(sft_body()).model_copy(update=changes)
    with pytest.raises(InvalidRequestError, match=sentence):
        with_runtime_defaults(broken, {"seed": 7, "reference_logprobs": "precomputed"})


def test_the_request_is_left_as_it_was() -> None:
    request = read(dpo_body())
    with_runtime_defaults(request, DEPLOYMENT)
    assert request.runtime is None


@pytest.mark.parametrize("kind", ["operator", "preference"])
def test_one_connection_serves_jobs_of_both_kinds(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    connect(monkeypatch, host="http://airflow/post-training", extra={"runtime": DEPLOYMENT})
    key = KEY if kind == "operator" else PREFERENCE_KEY
    spec = workplace.spec_of(getattr(workplace, kind)(), key)
    runtime = spec.request.runtime
    assert runtime is not None
    assert (runtime.seed, runtime.export) == (7, "merged")
    assert (runtime.adapter is None) is (kind == "operator")
    assert runtime.reference_logprobs == (None if kind == "operator" else "live")
    assert workplace.tracking.params.get("runtime.adapter.rank") == (None if kind == "operator" else 4)


def test_a_default_that_is_no_adapter_is_named(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"adapter": LORA | {"rank": 0}}
    connect(monkeypatch, host="http://airflow/post-training", extra={"runtime": defaults})
    with pytest.raises(AirflowFailException, match=r"extra runtime\.adapter\.rank: .* got 0"):
        workplace.preference().execute(workplace.context(PREFERENCE_KEY))
