"""What is printed: nothing cut, no bracket lost."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from post_training.cli import output
from post_training.cli.output import (
    print_fields,
    print_json,
    print_json_line,
    print_table,
    rounded,
    size,
    when,
)


def test_a_table_in_a_pipe_is_neither_cut_nor_broken(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "value"), [("x" * 300, "[red]a[/]"), ("y", None)])
    head, first, second = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert head.split() == ["name", "value"]
    assert first.split() == ["x" * 300, "[red]a[/]"]
    assert second == "y"


def test_on_a_narrow_terminal_what_is_long_is_folded_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "PIPE_WIDTH", 20)
    for show in (lambda text: print_table(("a",), [(text,)]), lambda text: print_fields({"a": text})):
        show("models:/m-10c2bd56d8944466987e630e4c3071c3")
        assert "models:/m-10c2bd56d8944466987e630e4c3071c3" in "".join(
            capsys.readouterr().out.split()
        ).lstrip("a")


def test_fields_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields({"job": "a", "error": None, "tokens": 0})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["job", "a"], ["tokens", "0"]]


def test_json_is_one_value_or_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": ["b\u2028", None]}
    print_json(value)
    assert json.loads(capsys.readouterr().out) == value
    print_json_line(value)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert json.loads(out) == value


def test_numbers_and_times_are_short() -> None:
    assert (rounded(1.23456), rounded(None)) == ("1.235", None)
    assert size(3 * 2**29) == "1.5 GiB"
    time = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
    assert when(time) == f"{time.astimezone():%Y-%m-%d %H:%M:%S}"
    assert when(None) is None
