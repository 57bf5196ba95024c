"""Messages in every accepted shape, and in shapes that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_modules.data.messages import BadRowError, check_text, parse_messages

ASK: dict[str, Any] = {"role": "user", "content": "2+2?"}
FUNCTION: dict[str, Any] = {"name": "add", "arguments": {"a": 2, "b": None}}


def message_of(**parts: Any) -> dict[str, Any]:
    """The one message that an assistant's message with these parts becomes."""
    (message,) = parse_messages([{"role": "assistant", "content": "4", **parts}], "dialog")
    return message


@pytest.mark.parametrize("value", [ASK, [ASK], json.dumps(ASK), json.dumps([ASK])])
def test_a_message_or_a_list_parsed_or_not(value: Any) -> None:
    assert parse_messages(value, "dialog") == [ASK]


def test_keys_without_a_value_are_left_out_and_others_kept() -> None:
    nulls = {"name": None, "tool_calls": None, "reasoning_content": "two and two"}
    assert message_of(**nulls) == {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    assert "tool_calls" not in message_of(tool_calls=[])


@pytest.mark.parametrize(
    "content",
    [
        "2+2?",
        {"type": "text", "text": "2+2?"},
        [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}],
        ["2+2", "?"],
    ],
)
def test_content_becomes_text(content: Any) -> None:
    assert message_of(content=content)["content"] == "2+2?"


def test_calls_need_no_content_and_keep_their_form() -> None:
    call = {"id": "1", "type": "function", "function": FUNCTION}
    assert message_of(content=None, tool_calls=[call]) == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call],
    }
    assert message_of(content=" ", tool_calls=[FUNCTION])["tool_calls"] == [FUNCTION]


@pytest.mark.parametrize(
    ("arguments", "parsed"), [('{"a": 2, "b": null}', {"a": 2, "b": None}), ("", {}), ({"a": 1}, {"a": 1})]
)
def test_arguments_become_objects(arguments: Any, parsed: Any) -> None:
    function = {"name": "add", "arguments": arguments}
    nested, flat = message_of(tool_calls=[{"function": function}, function])["tool_calls"]
    assert nested == {"function": {"name": "add", "arguments": parsed}}
    assert flat == {"name": "add", "arguments": parsed}


def test_a_tool_may_have_nothing_to_say() -> None:
    assert parse_messages({"role": "tool", "content": ""}, "dialog") == [{"role": "tool", "content": ""}]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "dialog is not JSON: "),
        pytest.param("[" * 100_000, "dialog is not JSON: ", id="deep"),
        pytest.param("1" * 5_000, "dialog is not JSON: ", id="long number"),
        ([], "dialog must be a message or a non-empty list of messages"),
        (3, "dialog must be a message or a non-empty list of messages"),
        (["x"], "dialog[0] must be an object, got str"),
        ([ASK, {"role": "human", "content": "x"}], "dialog[1].role must be one of"),
        ({"role": ["user"], "content": "x"}, "got ['user']"),
        ({"role": "assistant"}, "dialog[0].content must be text, got NoneType"),
        ({"role": "user", "content": " \n"}, "dialog[0].content is empty"),
        ({"role": "tool"}, "dialog[0].content must be text, got NoneType"),
        ({"role": "user", "content": [{"type": "image"}]}, "has a part that is not text: 'image'"),
        ({"role": "user", "content": [3]}, "has a part that is not text: 'int'"),
        (r'{"role": "user", "content": "a\ud83d"}', "content has half a surrogate pair at character 1"),
        ({"role": "tool", "content": "\ude00"}, "content has half a surrogate pair at character 0"),
        ({"role": "assistant", "tool_calls": "add"}, "tool_calls must be a list of objects, got str"),
        ({"role": "assistant", "tool_calls": ["add"]}, "tool_calls[0] must be an object, got str"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "a=1"}}]},
            "dialog[0].tool_calls[0].function.arguments is not JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"arguments": "[1]"}]},
            "tool_calls[0].arguments must be an object, got list",
        ),
    ],
)
def test_malformed(value: Any, reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        parse_messages(value, "dialog")
    assert reason in str(caught.value)


def test_whole_surrogate_pairs_are_one_character() -> None:
    assert parse_messages(r'{"role": "user", "content": "\ud83d\ude00"}', "dialog")[0]["content"] == "😀"


@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "must be text, got NoneType"), ("\t", "is empty"), ("a\ud83d", "half a surrogate pair")],
)
def test_text(value: Any, reason: str) -> None:
    assert check_text(" a ", "answer") == " a "
    with pytest.raises(BadRowError, match=f"answer .*{reason}"):
        check_text(value, "answer")
