"""Rows in every accepted shape, and in shapes that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_modules.data.formats import FORMATS, BadRowError, Turn, dialog_turns, instruct_turns
from post_training.schemas.training import DatasetFormat

ASK: dict[str, Any] = {"role": "user", "content": "2+2?"}
ASKED = Turn(ASK, train=False)
ANSWERED = Turn({"role": "assistant", "content": "4"}, train=True)


def test_every_format_of_the_schema_has_a_reader() -> None:
    assert set(FORMATS) == {kind.value for kind in DatasetFormat}


@pytest.mark.parametrize(
    "row",
    [
        {"chat_completion_input": json.dumps(ASK), "expected_answer": "4"},
        {"chat_completion_input": json.dumps([ASK]), "expected_answer": "4"},
        {"chat_completion_input": [ASK], "expected_answer": "4", "id": 3},
        {
            "chat_completion_input": json.dumps([ASK | {"content": {"type": "text", "text": "2+2?"}}]),
            "expected_answer": "4",
        },
        {"prompt": "2+2?", "completion": "4"},
        {"question": "2+2?", "answer": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"instruction": "2+2?", "input": "", "output": "4"},
    ],
)
def test_instruct(row: dict[str, Any]) -> None:
    assert instruct_turns(row) == [ASKED, ANSWERED]


def test_instruct_input_stands_below_the_instruction() -> None:
    turns = instruct_turns({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert turns[0].message["content"] == "Add.\n\n2 and 2"


SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
}
TOOL: dict[str, Any] = {"role": "tool", "content": "4", "name": "add"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize("column", ["dialog", "messages"])
@pytest.mark.parametrize("as_text", [True, False])
def test_dialog_learns_every_assistant_turn(column: str, as_text: bool) -> None:
    messages = [SYSTEM, ASK, CALL, TOOL, ANSWER, ASK, ANSWER]
    turns = dialog_turns({column: json.dumps(messages) if as_text else messages})
    assert [turn.train for turn in turns] == [False, False, True, False, True, False, True]
    assert [turn.message["role"] for turn in turns] == [m["role"] for m in messages]
    assert turns[2].message == CALL | {"content": ""}
    assert turns[3].message == TOOL


def test_nulls_of_columnar_files_are_left_out() -> None:
    turns = dialog_turns({"messages": [ASK | {"tool_calls": None}, ANSWER | {"name": None}]})
    assert [turn.message for turn in turns] == [ASK, ANSWER]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("instruct", {"text": "x"}, "has none of the column pairs"),
        ("instruct", {"prompt": "x"}, "completion must be text, got NoneType"),
        ("instruct", {"prompt": "x", "completion": " "}, "completion is empty"),
        ("instruct", {"prompt": 3, "completion": "x"}, "prompt must be text, got int"),
        (
            "instruct",
            {"chat_completion_input": "{", "expected_answer": "x"},
            "chat_completion_input is not JSON",
        ),
        ("instruct", {"chat_completion_input": "[]", "expected_answer": "x"}, "non-empty list"),
        ("instruct", {"chat_completion_input": [ANSWER], "expected_answer": "x"}, "ends with an assistant"),
        ("dialog", {"prompt": "x"}, "neither a dialog nor a messages column (columns: prompt)"),
        ("dialog", {"messages": [ASK]}, "no assistant message"),
        ("dialog", {"messages": ["x"]}, "messages[0] must be an object"),
        ("dialog", {"messages": [{"role": "human", "content": "x"}]}, "got 'human'"),
        ("dialog", {"dialog": [ASK, {"role": "assistant"}]}, "dialog[1].content must be text"),
        ("dialog", {"dialog": [{"role": "user", "content": [{"type": "image"}]}]}, "not text: 'image'"),
    ],
)
def test_bad_rows_give_a_reason(kind: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        FORMATS[kind](row)
    assert reason in str(caught.value)
