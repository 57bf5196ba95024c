"""What may be registered as a data set, and which names are ids."""

from __future__ import annotations

import json
from typing import Any, get_args

import jsonschema
import pytest
from llama_stack_client.types import dataset_register_params
from pydantic import ValidationError

from post_training.schemas.datasets import DatasetPurpose, RegisterDatasetRequest, parse_reference
from post_training.uris import DATA_SUFFIXES
from tests.hostile import nested

BODY: dict[str, Any] = {
    "purpose": "post-training/messages",
    "source": {"type": "rows", "rows": [{"question": "2+2?", "answer": "4"}]},
}

SCHEMA = RegisterDatasetRequest.model_json_schema()


def is_accepted(body: dict[str, Any]) -> bool:
    try:
        RegisterDatasetRequest.model_validate(body)
    except ValidationError:
        return False
    return True


def test_the_purposes_are_the_clients() -> None:
    hints = dataset_register_params.DatasetRegisterParams.__annotations__["purpose"]
    assert all(purpose in str(hints) for purpose in get_args(DatasetPurpose))
    assert len(get_args(DatasetPurpose)) == str(hints).count("/")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataset_id": None, "metadata": None},
        {"dataset_id": "a"},
        {"dataset_id": "9._-" + "x" * 196},
        {"dataset_id": "train.jsonl.v2"},
        {"metadata": {"a": [1, None, {"b": 1.5}]}},
        {"source": {"uri": "s3://bucket/rows.jsonl"}},
        {"source": {"type": None, "uri": "s3://bucket/rows.jsonl"}},
        {"source": {"rows": [{}]}},
        {"source": {"type": "uri", "uri": "s3://bucket/rows.jsonl", "rows": None}},
        {"purpose": "eval/question-answer"},
        {"purpose": "eval/messages-answer"},
    ],
)
def test_what_is_accepted_is_described(changes: dict[str, Any]) -> None:
    assert is_accepted(BODY | changes)
    jsonschema.validate(BODY | changes, SCHEMA)


@pytest.mark.parametrize(
    ("changes", "loc", "kind"),
    [
        ({"purpose": "post-training/pairs"}, ("purpose",), "literal_error"),
        ({"colour": "red"}, ("colour",), "extra_forbidden"),
        *(
            ({"dataset_id": name}, ("dataset_id",), "dataset_id")
            for name in (
                *("", "a/b", "a:b", "a@b", "a b", "ä", ".", "..", "-a", "x" * 201),
                *(f"train{suffix}" for suffix in DATA_SUFFIXES),
            )
        ),
        ({"source": {"type": "rows", "rows": []}}, ("source", "rows"), "too_short"),
        ({"source": {"type": "rows", "rows": [{}, "a"]}}, ("source", "rows", 1), "dict_type"),
        ({"source": {"type": "uri", "uri": ""}}, ("source", "uri"), "string_too_short"),
        ({"source": {"type": "file", "uri": "a"}}, ("source", "type"), "literal_error"),
        ({"source": {"type": "uri", "uri": "a:b", "path": "c"}}, ("source", "path"), "extra_forbidden"),
        ({"source": {"type": "rows", "uri": "a:b"}}, ("source",), "dataset_source"),
        ({"source": {"type": "uri", "rows": [{}]}}, ("source",), "dataset_source"),
        ({"source": {"type": "uri", "uri": "a:b", "rows": [{}]}}, ("source",), "dataset_source"),
        ({"source": {"type": "uri", "uri": None}}, ("source",), "dataset_source"),
        ({"source": {"type": "uri"}}, ("source",), "dataset_source"),
        ({"source": {}}, ("source",), "dataset_source"),
    ],
)
def test_what_is_refused_is_described_too(
    changes: dict[str, Any], loc: tuple[str | int, ...], kind: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        RegisterDatasetRequest.model_validate(BODY | changes)
    assert [(error["loc"], error["type"]) for error in caught.value.errors()] == [(loc, kind)]
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(BODY | changes)


@pytest.mark.parametrize(
    ("changes", "loc", "kind"),
    [
        ({"source": {"rows": [{"a": float("nan")}]}}, ("source", "rows"), "json_value"),
        ({"source": {"rows": [{"a": [float("inf")]}]}}, ("source", "rows"), "json_value"),
        ({"source": {"rows": [{"a": "\ud800"}]}}, ("source", "rows"), "string_unicode"),
        ({"source": {"rows": [{"a\0": 1}]}}, ("source", "rows"), "string_unicode"),
        ({"dataset_id": "a\n"}, ("dataset_id",), "dataset_id"),
        ({"source": {"uri": "data:,\ud800"}}, ("source", "uri"), "string_unicode"),
        ({"metadata": {"a": float("-inf")}}, ("metadata",), "json_value"),
        ({"metadata": {"a": "\0"}}, ("metadata",), "string_unicode"),
        ({"metadata": {"a": "x" * 5000}}, ("metadata",), "too_long"),
        ({"metadata": {"a": nested(64)}}, ("metadata",), "json_value"),
        ({"source": {"rows": [{"a": nested(63)}]}}, ("source", "rows"), "json_value"),
    ],
)
def test_what_json_schema_cannot_say_is_refused(
    changes: dict[str, Any], loc: tuple[str, ...], kind: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        RegisterDatasetRequest.model_validate(BODY | changes)
    assert [(error["loc"], error["type"]) for error in caught.value.errors()] == [(loc, kind)]


def test_nesting_has_a_limit_that_the_refusal_names() -> None:
    deepest = {"source": {"rows": [{"a": nested(62)}]}, "metadata": {"a": nested(62), "b": {"c": nested(62)}}}
    request = RegisterDatasetRequest.model_validate(BODY | deepest)
    assert json.loads(request.model_dump_json())["source"]["rows"] == [{"a": nested(62)}]
    rows = [{"b": 1}, {"a": nested(4999)}]
    for field in ({"metadata": {"a": nested(5000)}}, {"source": {"rows": rows}}):
        with pytest.raises(ValidationError, match="may be nested 64 levels deep, got 5001"):
            RegisterDatasetRequest.model_validate(BODY | field)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("math", ("math", None)),
        ("train.jsonl.v2", ("train.jsonl.v2", None)),
        ("math@0123abcd", ("math", "0123abcd")),
        ("math@" + "a" * 64, ("math", "a" * 64)),
        *(
            (name, None)
            for name in ("", "train.jsonl", "train.jsonl@0123abcd", "a/b", "s3://a", "a b", "..", "x" * 201)
        ),
        *((f"math@{digits}", None) for digits in ("", "0123abc", "0123ABCD", "0123abcg", "a" * 65, "a@b")),
    ],
)
def test_references(name: str, reference: tuple[str, str | None] | None) -> None:
    assert parse_reference(name) == reference
