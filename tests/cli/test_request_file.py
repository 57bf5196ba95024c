"""Requests in YAML: what is read as what, and where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from post_training.cli.request_file import method_of, read_body
from post_training.errors import InvalidRequestError
from post_training.schemas.rlhf import read_request
from tests.documents import ROOT, blocks
from tests.requests_of import dpo_body, rlhf_body, sft_body


def read(folder: Path, text: str | bytes, job_uuid: str | None = None) -> dict[str, Any]:
    file = folder / "request.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_body(file, job_uuid=job_uuid, default_job_uuid="default")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("-.5", -0.5),
        ("3", 3),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("2026-01-31", "2026-01-31"),
        ("12:30:00", "12:30:00"),
        ("010", "010"),
        ("0x1F", "0x1F"),
        (".nan", ".nan"),
        ("'3'", "3"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("grüße", "grüße"),
    ],
)
def test_values_are_those_of_yaml_1_2(folder: Path, text: str, value: Any) -> None:
    found = read(folder, f"field: {text}\n")["field"]
    assert (found, type(found)) == (value, type(value))


def test_what_is_not_said_is_filled_in(folder: Path) -> None:
    assert read(folder, "model: m") == {
        "hyperparam_search_config": {},
        "logger_config": {},
        "model": "m",
        "job_uuid": "default",
    }
    assert read(folder, "job_uuid: own")["job_uuid"] == "own"
    assert read(folder, "job_uuid: own", "option")["job_uuid"] == "option"


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("a: 1\nb: [1\nc: 2\n", ":3", "expected ',' or ']'"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", ":4", "the field 'c' stands twice"),
        ("a: 1\n2: b\n", ":2", "a field's name must be text, got 2"),
        ("a: 1\n---\nb: 1\n", ":2", "another document"),
        ("a: !!python/name:os.system x\n", ":1", "could not determine a constructor"),
        (b"a: \xff\n", "", "invalid start byte"),
        ("a: \x01", "", "special characters are not allowed"),
        ("- a\n", "", "must hold an object, got list"),
        ("", "", "must hold an object, got NoneType"),
        ("a: &x [*x]\n", "", "Circular reference"),
        ("a: !!binary aGk=\n", "", "bytes is not JSON"),
        ("a: !!float .nan\n", "", "not JSON compliant"),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_and_line(
    folder: Path, text: str | bytes, place: str, problem: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(folder, text)
    (error,) = caught.value.errors
    assert error["loc"] == [f"{folder / 'request.yaml'}{place}"]
    assert problem in error["msg"]


def test_numbers_of_the_quick_start_are_numbers(folder: Path) -> None:
    (block, *_) = [one for one in blocks(ROOT / "docs" / "quick-start.md") if one.language == "yaml"]
    body = read(folder, block.text)
    request = read_request(method_of(body), body)
    assert request.training_config.optimizer_config is not None
    assert request.training_config.optimizer_config.lr == 2e-4


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"nothing\.yaml: cannot be read: No such file"):
        read_body(folder / "nothing.yaml", job_uuid=None, default_job_uuid="x")


@pytest.mark.parametrize(
    ("body", "method"),
    [
        (sft_body(), "supervised_fine_tune"),
        (dpo_body(), "preference_optimize"),
        (rlhf_body(), "preference_optimize"),
        (sft_body(model=...), "supervised_fine_tune"),
        (sft_body(finetuned_model="both"), "supervised_fine_tune"),
    ],
)
def test_the_method_follows_from_the_fields(body: dict[str, Any], method: str) -> None:
    assert method_of(body) == method
