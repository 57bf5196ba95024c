"""What every JSON text goes through: how it is read, and which characters it may hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from post_training.schemas.base import check_text, load_json


def with_last_name_twice(size: int) -> str:
    """Return an object of about so many bytes, each of its names once but the last one."""
    names = [f'"n{number:09}": 0' for number in range(size // 16)]
    return f"{{{', '.join([*names, names[-1]])}}}"


def test_a_name_twice_is_found_among_very_many() -> None:
    """To compare each with each takes longer than a test may."""
    size = 10 * 2**20
    with pytest.raises(ValueError, match=f"the name 'n{size // 16 - 1:09}' twice"):
        load_json(with_last_name_twice(size))


@pytest.mark.parametrize("text", ['{"a": 1, "b": {"a": 2}}', '[{"a": 1}, {"a": 1}]', "{}"])
def test_a_name_in_two_objects_is_none_twice(text: str) -> None:
    assert load_json(text) == json.loads(text)


@pytest.mark.parametrize("text", ["\\u0000", "a\\u0000b", "\\\\u0000", "\\", "\\u0001", "u0000", "\x01"])
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: {"a": [text]}, lambda text: {text: 1}])
def test_a_text_about_nul_is_text(text: str, wrap: Any) -> None:
    assert check_text(wrap(text)) == wrap(text)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\\\0", "\\\\\0", "\\u0000\0", "\0\\u0000", "\\\\\\\0"])
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: {"a": [text]}, lambda text: {text: 1}])
def test_nul_is_refused_whatever_stands_before_it(text: str, wrap: Any) -> None:
    with pytest.raises(PydanticCustomError, match="it holds the character NUL"):
        check_text(wrap(text))


def test_very_many_backslashes_are_searched() -> None:
    """In quadratic time it would take longer than a test may."""
    text = "\\" * (5 * 2**20)
    assert check_text(text) == text
