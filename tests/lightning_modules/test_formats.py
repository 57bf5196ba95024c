"""Rows in every accepted shape, and in shapes that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_modules.data.formats import (
    FORMATS,
    PREFERENCE_FORMATS,
    BadRowError,
    Pair,
    Turn,
    dialog_pair,
    dialog_turns,
    instruct_pair,
    instruct_turns,
    tools_of,
)
from post_training.schemas.training import DatasetFormat

SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
ASK: dict[str, Any] = {"role": "user", "content": "2+2?"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
}
TOOL: dict[str, Any] = {"role": "tool", "content": "4", "name": "add"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "4"}
WRONG: dict[str, Any] = {"role": "assistant", "content": "5"}
ASKED = Turn(ASK, train=False)
ANSWERED = Turn(ANSWER, train=True)


def turns(context: list[dict[str, Any]], rest: list[dict[str, Any]]) -> list[Turn]:
    """Context is not learned; after it every assistant message is."""
    return [Turn(m, False) for m in context] + [Turn(m, m["role"] == "assistant") for m in rest]


def test_every_format_of_the_schema_has_a_reader() -> None:
    assert set(FORMATS) == set(PREFERENCE_FORMATS) == {kind.value for kind in DatasetFormat}


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
        {"prompt": [ASK], "completion": [ANSWER]},
        {"prompt": [ASK], "completion": "4"},
        {"prompt": "2+2?", "completion": ANSWER},
        {"question": "2+2?", "answer": "4"},
        {"prompt": "of a template", "question": "2+2?", "answer": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"instruction": "2+2?", "input": "", "output": "4"},
    ],
)
def test_instruct(row: dict[str, Any]) -> None:
    assert instruct_turns(row) == [ASKED, ANSWERED]


def test_instruct_input_stands_below_the_instruction() -> None:
    read = instruct_turns({"instruction": "Add.", "input": "2 and 2", "output": "4"})
    assert read[0].message["content"] == "Add.\n\n2 and 2"


def test_instruct_learns_every_assistant_message_of_the_answer_alone() -> None:
    row = {"prompt": [SYSTEM, ASK, ANSWER, ASK], "completion": [CALL, TOOL, ANSWER]}
    assert instruct_turns(row) == turns([SYSTEM, ASK, ANSWER, ASK], [CALL, TOOL, ANSWER])
    tools = {"prompt": [ASK, CALL, TOOL], "completion": [TOOL, ANSWER]}
    assert instruct_turns(tools) == turns([ASK, CALL, TOOL], [TOOL, ANSWER])


def test_instruct_takes_text_as_it_is() -> None:
    read = instruct_turns({"prompt": json.dumps([ASK]), "completion": "4"})
    assert read[0].message == {"role": "user", "content": json.dumps([ASK])}


@pytest.mark.parametrize("column", ["dialog", "messages"])
@pytest.mark.parametrize("as_text", [True, False])
def test_dialog_learns_every_assistant_turn(column: str, as_text: bool) -> None:
    messages = [SYSTEM, ASK, CALL, TOOL, ANSWER, ASK, ANSWER]
    read = dialog_turns({column: json.dumps(messages) if as_text else messages})
    assert [turn.train for turn in read] == [False, False, True, False, True, False, True]
    assert [turn.message for turn in read] == messages


PROMPTED = Pair(turns([ASK], [ANSWER]), turns([ASK], [WRONG]))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": [ANSWER], "rejected": [WRONG]},
        {"prompt": ASK, "chosen": ANSWER, "rejected": WRONG},
        {"prompt": "2+2?", "chosen": [ASK, ANSWER], "rejected": [ASK, WRONG], "score": 3},
        {"prompt": "2+2?", "chosen": [ASK, ANSWER], "rejected": "5"},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, WRONG]},
        {"prompt": None, "chosen": [ASK, ANSWER], "rejected": [ASK | {"name": None}, WRONG]},
    ],
)
def test_instruct_pair(row: dict[str, Any]) -> None:
    assert instruct_pair(row) == PROMPTED


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": json.dumps(ASK), "chosen": json.dumps(ANSWER), "rejected": json.dumps([WRONG])},
        {"prompt": [ASK], "chosen": json.dumps([ASK, ANSWER]), "rejected": json.dumps([ASK, WRONG])},
        {"chosen": json.dumps([ASK, ANSWER]), "rejected": json.dumps([ASK, WRONG])},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, WRONG]},
    ],
)
def test_dialog_pair(row: dict[str, Any]) -> None:
    assert dialog_pair(row) == PROMPTED


@pytest.mark.parametrize("read", [instruct_pair, dialog_pair])
def test_pairs_of_many_turns(read: Any) -> None:
    prompt = [SYSTEM, ASK, WRONG, ASK]
    expected = Pair(
        turns(prompt, [CALL, TOOL, ANSWER]),
        turns(prompt, [WRONG, ASK, ANSWER]),
    )
    row = {"chosen": [CALL, TOOL, ANSWER], "rejected": [WRONG, ASK, ANSWER]}
    assert read({"prompt": prompt, **row}) == expected
    whole = {column: prompt + rest for column, rest in row.items()}
    assert read(whole) == expected
    assert read({"prompt": prompt, **whole}) == expected


def test_messages_that_both_answers_begin_with_are_context() -> None:
    pair = instruct_pair({"prompt": "2+2?", "chosen": [CALL, TOOL, ANSWER], "rejected": [CALL, TOOL, WRONG]})
    assert pair == Pair(turns([ASK, CALL, TOOL], [ANSWER]), turns([ASK, CALL, TOOL], [WRONG]))


def test_a_system_message_may_stand_before_the_repeated_prompt() -> None:
    row = {"prompt": "2+2?", "chosen": [SYSTEM, ASK, ANSWER], "rejected": [SYSTEM, ASK, WRONG]}
    assert instruct_pair(row) == Pair(turns([SYSTEM, ASK], [ANSWER]), turns([SYSTEM, ASK], [WRONG]))


def test_a_system_message_alone_may_be_the_prompt() -> None:
    row = {"prompt": [SYSTEM], "chosen": [ANSWER], "rejected": [WRONG]}
    assert instruct_pair(row) == Pair(turns([SYSTEM], [ANSWER]), turns([SYSTEM], [WRONG]))


SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": None}}}}


@pytest.mark.parametrize(
    ("row", "tools"),
    [
        ({"tools": [SCHEMA]}, [SCHEMA]),
        ({"tools": json.dumps([SCHEMA])}, [SCHEMA]),
        ({"tools": []}, None),
        ({"tools": "[]"}, None),
        ({"tools": None}, None),
        ({"messages": []}, None),
    ],
)
def test_tools(row: dict[str, Any], tools: Any) -> None:
    assert tools_of(row) == tools


@pytest.mark.parametrize("tools", [SCHEMA, ["add"], "add", 3, '{"a": 1}'])
def test_bad_tools(tools: Any) -> None:
    with pytest.raises(BadRowError, match=r"^tools (must be a list of objects|is not JSON)"):
        tools_of({"tools": tools})


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("instruct", {"text": "x", "answer": None}, "has none of the column pairs"),
        (
            "instruct",
            {"prompt": "x", "answer": None},
            "question and answer; instruction and output (columns: prompt)",
        ),
        ("instruct", {}, "(columns: none)"),
        ("instruct", {"prompt": "x", "completion": " "}, "completion is empty"),
        ("instruct", {"prompt": 3, "completion": "x"}, "prompt must be text, got int"),
        (
            "instruct",
            {"instruction": [ASK], "input": "x", "output": "y"},
            "instruction must be text, got list",
        ),
        (
            "instruct",
            {"chat_completion_input": "{", "expected_answer": "x"},
            "chat_completion_input is not JSON",
        ),
        ("instruct", {"chat_completion_input": "[]", "expected_answer": "x"}, "non-empty list"),
        ("instruct", {"chat_completion_input": [ASK]}, "expected_answer must be text, got NoneType"),
        (
            "instruct",
            {"chat_completion_input": [ASK, ANSWER], "expected_answer": "x"},
            "expected_answer begins with a message of role assistant, which cannot follow the last of"
            " chat_completion_input, of role assistant",
        ),
        ("instruct", {"prompt": [ASK], "completion": [ASK, ANSWER]}, "begins with a message of role user"),
        (
            "instruct",
            {"prompt": [ASK], "completion": [SYSTEM, ANSWER]},
            "begins with a message of role system",
        ),
        ("instruct", {"prompt": [ASK], "completion": [TOOL]}, "completion has no assistant message"),
        (
            "dialog",
            {"prompt": "x", "dialog": None},
            "neither a dialog nor a messages column (columns: prompt)",
        ),
        ("dialog", {"messages": [ASK]}, "messages has no assistant message"),
        ("dialog", {"dialog": [ASK, {"role": "assistant"}]}, "dialog[1].content must be text"),
    ],
)
def test_bad_rows_give_a_reason(kind: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        FORMATS[kind](row)
    assert reason in str(caught.value)


def pair_row(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """A preference row; None leaves a column empty."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "id": 1}


ELSE = {"role": "user", "content": "3+3?"}
ALONE = "after what it shares with the other"
NEARLY = {"role": "user", "content": "2+2? "}


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("instruct", pair_row("x", None, "b"), "has no chosen column (columns: id, prompt, rejected)"),
        ("instruct", {"text": "x"}, "has no chosen and no rejected column (columns: text)"),
        ("instruct", pair_row("x", "a", "a"), "chosen and rejected are identical"),
        ("instruct", pair_row("2+2?", [ASK, ANSWER], "4"), "chosen and rejected are identical"),
        ("instruct", pair_row(" ", "a", "b"), "prompt is empty"),
        ("instruct", pair_row("x", "a", " "), "rejected is empty"),
        ("instruct", pair_row("x", "a", 3), "rejected must be text, got int"),
        ("instruct", pair_row([], "a", "b"), "prompt must be a message or a non-empty list"),
        ("instruct", pair_row(None, "a", "b"), "no common beginning (columns: chosen, id, rejected)"),
        ("instruct", pair_row(None, [ASK, ANSWER], [ELSE, WRONG]), "no common beginning"),
        ("instruct", pair_row("2+2?", [SYSTEM, ASK, ANSWER], [ASK, WRONG]), "no common beginning"),
        (
            "instruct",
            pair_row("2+2?", [NEARLY, ANSWER], [ASK, WRONG]),
            "chosen begins with a message of role user",
        ),
        (
            "instruct",
            pair_row("2+2?", [ASK, ANSWER], [SYSTEM, ELSE, WRONG]),
            "rejected begins with a message of role system",
        ),
        (
            "instruct",
            pair_row([ASK, ANSWER], [ANSWER], [WRONG]),
            "chosen begins with a message of role assistant",
        ),
        (
            "instruct",
            pair_row(None, [ASK, ANSWER], [ASK, ANSWER, ASK, WRONG]),
            f"chosen, {ALONE}, has no assistant message",
        ),
        ("instruct", pair_row("2+2?", [ASK, ANSWER], [ASK]), f"rejected, {ALONE}, has no assistant message"),
        ("instruct", pair_row("2+2?", [ANSWER], [TOOL]), f"rejected, {ALONE}, has no assistant message"),
        (
            "instruct",
            pair_row(None, [SYSTEM, ASK, ANSWER], [SYSTEM, ELSE, WRONG]),
            "they answer different questions",
        ),
        ("dialog", pair_row("[]", "[]", "[]"), "prompt must be a message or a non-empty list"),
        ("dialog", pair_row("two?", [ASK, ANSWER], [ASK, WRONG]), "prompt is not JSON"),
        ("dialog", pair_row(None, "4", "5"), "chosen must be a message or a non-empty list"),
    ],
)
def test_bad_pairs_give_a_reason(kind: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        PREFERENCE_FORMATS[kind](row)
    assert reason in str(caught.value)
