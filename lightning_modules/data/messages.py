"""Messages as data sets hold them become messages as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


class BadRowError(ValueError):
    """A row cannot be used; the text is the reason, without the row's number."""


def parse_json(text: str, name: str) -> Any:
    """Parse a cell that holds JSON.

    :param name: of the cell, for the reason.
    :raises BadRowError: if it is no JSON, is nested too deeply or holds too long a number.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{name} is not JSON: {error}") from None


def check_text(value: Any, name: str) -> str:
    """Return text that has something to learn from.

    :raises BadRowError: if it is no text, is blank, or cannot be encoded.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise BadRowError(f"{name} is empty")
    return _encodable(value, name)


def parse_messages(value: Any, name: str) -> list[Message]:
    """Read a message, or a list of messages, as JSON text or parsed.

    Content becomes text, a missing one with ``tool_calls`` the empty text; the arguments of calls become
    objects; keys without a value are left out. Whatever else a message holds is the template's.

    :raises BadRowError: if there is no message, or one is malformed.
    """
    if isinstance(value, str):
        value = parse_json(value, name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} must be a message or a non-empty list of messages")
    return [_message(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise BadRowError(f"{name} must be an object, got {type(item).__name__}")
    role = item.get("role")
    if role not in ROLES:
        raise BadRowError(f"{name}.role must be one of {', '.join(ROLES)}, got {role!r}")
    # Files fill the keys that a message lacks with nulls; templates test for presence.
    message = {key: part for key, part in item.items() if part is not None}
    calls = message.pop("tool_calls", [])
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{name}.tool_calls")
    message["content"] = _content(item.get("content"), f"{name}.content", silent=bool(calls), role=role)
    return message


def _content(content: Any, name: str, *, silent: bool, role: str) -> str:
    """Reduce a message's content to text; a list of text parts is joined.

    :param silent: whether the message says enough without content.
    """
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    if content is None and silent:
        return ""
    if isinstance(content, str) and (silent or role == "tool"):  # a tool may have nothing to say
        return _encodable(content, name)
    return check_text(content, name)


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadRowError(f"{name} has a part that is not text: {kind!r}")


def _tool_calls(calls: Any, name: str) -> list[Message]:
    if not isinstance(calls, list):
        raise BadRowError(f"{name} must be a list of objects, got {type(calls).__name__}")
    return [_tool_call(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, name: str) -> Message:
    if not isinstance(call, Mapping):
        raise BadRowError(f"{name} must be an object, got {type(call).__name__}")
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], f"{name}.function")}
    return _with_arguments(call, name)


def _with_arguments(function: Mapping[str, Any], name: str) -> Message:
    """Parse arguments that are JSON text, as OpenAI's are: a template would quote the text once more.

    Reference: https://huggingface.co/docs/transformers/chat_extras
    """
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return dict(function)
    parsed = parse_json(arguments or "{}", f"{name}.arguments")
    if not isinstance(parsed, Mapping):
        raise BadRowError(f"{name}.arguments must be an object, got {type(parsed).__name__}")
    return {**function, "arguments": parsed}


def _encodable(text: str, name: str) -> str:
    """Refuse half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{name} has half a surrogate pair at character {error.start}") from None
    return text
