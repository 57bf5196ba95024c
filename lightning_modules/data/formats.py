"""A row of a data set becomes the turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from post_training.schemas.training import DatasetFormat

ROLES = ("system", "user", "assistant", "tool")

INSTRUCT_KEYS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Pairs of columns, question first, that an instruct row may use instead of chat_completion_input."""


class BadRowError(ValueError):
    """A row cannot be used; the text is the reason, without the row's number."""


@dataclass(frozen=True)
class Turn:
    """One message as the chat template takes it, and whether its tokens are learned."""

    message: dict[str, Any]
    train: bool


def instruct_turns(row: Mapping[str, Any]) -> list[Turn]:
    """Read one question with its answer.

    Accepted are ``chat_completion_input`` (a message, or a list of messages, as JSON text or parsed)
    with ``expected_answer``; and the pairs prompt/completion, question/answer and
    instruction/output, the last with an optional ``input`` that is put below the instruction.

    :raises BadRowError: if neither shape fits.
    """
    if row.get("chat_completion_input") is not None:
        question = _messages(row["chat_completion_input"], "chat_completion_input")
        if question[-1]["role"] == "assistant":
            raise BadRowError("chat_completion_input ends with an assistant message")
        return [*_turns(question, learn=False), _answer(row, "expected_answer")]
    for asked, answered in INSTRUCT_KEYS:
        if row.get(asked) is not None:
            text = _text(row, asked)
            if asked == "instruction" and row.get("input"):
                text = f"{text}\n\n{_text(row, 'input')}"
            return [Turn({"role": "user", "content": text}, train=False), _answer(row, answered)]
    shapes = ["chat_completion_input and expected_answer", *(" and ".join(pair) for pair in INSTRUCT_KEYS)]
    raise BadRowError(f"has none of the column pairs {'; '.join(shapes)} (columns: {_columns(row)})")


def dialog_turns(row: Mapping[str, Any]) -> list[Turn]:
    """Read a conversation from ``dialog`` or ``messages`` (a list of messages, as JSON text or parsed).

    Every assistant turn is learned; system, user and tool turns are context.

    :raises BadRowError: if there is no conversation, or no assistant turn in it.
    """
    for column in ("dialog", "messages"):
        if row.get(column) is not None:
            turns = _turns(_messages(row[column], column), learn=True)
            if not any(turn.train for turn in turns):
                raise BadRowError(f"{column} has no assistant message")
            return turns
    raise BadRowError(f"has neither a dialog nor a messages column (columns: {_columns(row)})")


FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Turn]]] = {
    DatasetFormat.instruct.value: instruct_turns,
    DatasetFormat.dialog.value: dialog_turns,
}
"""Reader of a row for each value of ``data_format``."""


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(row)[:10]) or "none"


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise BadRowError(f"{column} must be text, got {type(value).__name__}")
    if not value.strip():
        raise BadRowError(f"{column} is empty")
    return value


def _answer(row: Mapping[str, Any], column: str) -> Turn:
    return Turn({"role": "assistant", "content": _text(row, column)}, train=True)


def _turns(messages: list[dict[str, Any]], *, learn: bool) -> list[Turn]:
    return [Turn(m, train=learn and m["role"] == "assistant") for m in messages]


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Parse JSON text if it is text, and check each message."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRowError(f"{column} is not JSON: {error}") from None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} must be a message or a non-empty list of messages")
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, name: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise BadRowError(f"{name} must be an object, got {type(item).__name__}")
    role = item.get("role")
    if role not in ROLES:
        raise BadRowError(f"{name}.role must be one of {', '.join(ROLES)}, got {role!r}")
    # Columnar files fill the keys that a message lacks with nulls; templates test for presence.
    message = {key: part for key, part in item.items() if part is not None}
    message["content"] = _content(item.get("content"), name, required=not message.get("tool_calls"))
    return message


def _content(content: Any, name: str, *, required: bool) -> str:
    """Reduce a message's content to text; a list of text parts is joined."""
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    if content is None and not required:
        return ""
    if not isinstance(content, str):
        raise BadRowError(f"{name}.content must be text, got {type(content).__name__}")
    if required and not content.strip():
        raise BadRowError(f"{name}.content is empty")
    return content


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadRowError(f"{name}.content has a part that is not text: {kind!r}")
