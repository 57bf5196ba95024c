"""A row of a data set becomes the turns of a conversation, or of a chosen and a rejected one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from lightning_modules.data.messages import BadRowError, Message, check_text, parse_json, parse_messages
from post_training.schemas.training import DatasetFormat

INSTRUCT_KEYS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
"""Pairs of columns, question first, that an instruct row may use instead of chat_completion_input."""

Row = Mapping[str, Any]
CellReader = Callable[[Any, str, str], list[Message]]
"""Takes a cell, its column, and the role that plain text has."""


@dataclass(frozen=True)
class Turn:
    """One message as the chat template takes it, and whether its tokens are learned."""

    message: Message
    train: bool


class Pair(NamedTuple):
    """Two conversations that begin with the same turns, none of which is learned."""

    chosen: list[Turn]
    rejected: list[Turn]


def instruct_turns(row: Row) -> list[Turn]:
    """Read a question with its answer.

    Accepted are ``chat_completion_input`` (a message or a list of messages, as JSON text or parsed) with
    ``expected_answer``; and the pairs prompt/completion, question/answer and instruction/output, the
    last with an optional ``input`` that is put below the instruction. Text is taken as it is; a list
    is messages, and every assistant message of the answer is learned.

    :raises BadRowError: if neither shape fits.
    """
    if row.get("chat_completion_input") is not None:
        asked, answered = "chat_completion_input", "expected_answer"
        question = parse_messages(row[asked], asked)
    else:
        asked, answered = _instruct_columns(row)
        question = _as_text(_with_input(row) if asked == "instruction" else row[asked], asked, "user")
    answer = _as_text(row.get(answered), answered, "assistant")
    _check_follows(answer, answered, question, asked)
    _check_answers(answer, answered)
    return _turns([*question, *answer], learned_from=len(question))


def dialog_turns(row: Row) -> list[Turn]:
    """Read a conversation from ``dialog`` or ``messages`` (a list of messages, as JSON text or parsed).

    Every assistant turn is learned; system, user and tool turns are context.

    :raises BadRowError: if there is no conversation, or no assistant turn in it.
    """
    for column in ("dialog", "messages"):
        if row.get(column) is not None:
            messages = parse_messages(row[column], column)
            _check_answers(messages, column)
            return _turns(messages, learned_from=0)
    raise BadRowError(f"has neither a dialog nor a messages column (columns: {_columns(row)})")


def instruct_pair(row: Row) -> Pair:
    """Read a preference whose text is taken as it is: a user's prompt and an assistant's answers.

    Accepted are ``prompt``, ``chosen`` and ``rejected``, each as text or as messages (a list, or one),
    where answers as messages may repeat the prompt at their start; and, without ``prompt``, whole
    conversations in ``chosen`` and ``rejected``. The messages that both conversations begin with are
    context; every assistant message after them is learned.

    :raises BadRowError: if the columns do not fit, the answers are the same, or they answer nothing that
        both share.
    """
    return _pair(row, _as_text)


def dialog_pair(row: Row) -> Pair:
    """Read a preference whose text is JSON of a message or a list of messages; else as ``instruct_pair``.

    :raises BadRowError: as ``instruct_pair`` does.
    """
    return _pair(row, _as_json)


FORMATS: dict[str, Callable[[Row], list[Turn]]] = {
    DatasetFormat.instruct.value: instruct_turns,
    DatasetFormat.dialog.value: dialog_turns,
}
"""Reader of a row for each value of ``data_format``."""

PREFERENCE_FORMATS: dict[str, Callable[[Row], Pair]] = {
    DatasetFormat.instruct.value: instruct_pair,
    DatasetFormat.dialog.value: dialog_pair,
}
"""Reader of a preference row for each value of ``data_format``."""


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """Return the tools that a row's conversations may call; None where it has none.

    :returns: the ``tools`` column, a list of objects as JSON text or parsed, for the template's ``tools``.
    :raises BadRowError: if it is anything else.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        raise BadRowError("tools must be a list of objects")
    return [dict(tool) for tool in tools] if tools else None


def _instruct_columns(row: Row) -> tuple[str, str]:
    for asked, answered in INSTRUCT_KEYS:
        if row.get(asked) is not None and row.get(answered) is not None:
            return asked, answered
    shapes = ["chat_completion_input and expected_answer", *(" and ".join(pair) for pair in INSTRUCT_KEYS)]
    raise BadRowError(f"has none of the column pairs {'; '.join(shapes)} (columns: {_columns(row)})")


def _with_input(row: Row) -> Any:
    if not row.get("input"):
        return row["instruction"]
    return f"{check_text(row['instruction'], 'instruction')}\n\n{check_text(row['input'], 'input')}"


def _columns(row: Row) -> str:
    """Name the columns that hold something."""
    return ", ".join(sorted(column for column, cell in row.items() if cell is not None)[:10]) or "none"


def _as_text(cell: Any, column: str, role: str) -> list[Message]:
    if isinstance(cell, list | Mapping):
        return parse_messages(cell, column)
    return [{"role": role, "content": check_text(cell, column)}]


def _as_json(cell: Any, column: str, role: str) -> list[Message]:
    return parse_messages(cell, column)


def _turns(messages: Sequence[Message], *, learned_from: int) -> list[Turn]:
    return [
        Turn(message, train=i >= learned_from and message["role"] == "assistant")
        for i, message in enumerate(messages)
    ]


def _pair(row: Row, read: CellReader) -> Pair:
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise BadRowError(f"has no {' and no '.join(missing)} column (columns: {_columns(row)})")
    prompt = read(row["prompt"], "prompt", "user") if row.get("prompt") is not None else []
    chosen, rejected = (
        _conversation(prompt, read(row[column], column, "assistant"), column)
        for column in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise BadRowError("chosen and rejected are identical")
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
    if not shared:
        raise BadRowError(f"chosen and rejected have no common beginning (columns: {_columns(row)})")
    for column, conversation in (("chosen", chosen), ("rejected", rejected)):
        _check_goes_on(conversation[shared:], column)
    return Pair(_turns(chosen, learned_from=shared), _turns(rejected, learned_from=shared))


def _conversation(prompt: list[Message], answer: list[Message], column: str) -> list[Message]:
    """Put the prompt before an answer that does not repeat it, be it below a system message of its own."""
    if not prompt:
        return answer
    start = int(answer[0]["role"] == "system" and prompt[0]["role"] != "system")
    if answer[start : start + len(prompt)] == prompt:
        return answer
    _check_follows(answer, column, prompt, "prompt")
    return [*prompt, *answer]


def _check_follows(answer: list[Message], column: str, prompt: list[Message], prompt_column: str) -> None:
    """Refuse what is more likely a prompt that is not quite repeated, or a turn that is to be continued.

    A template would render either as a turn of its own, without a word.
    """
    last, first = prompt[-1]["role"], answer[0]["role"]
    if first == "system" or (first == last and first != "tool"):
        raise BadRowError(
            f"{column} begins with a message of role {first}, which cannot follow the last of"
            f" {prompt_column}, of role {last}"
        )


def _check_answers(messages: Sequence[Message], column: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError(f"{column} has no assistant message")


def _check_goes_on(rest: Sequence[Message], column: str) -> None:
    """Check what a conversation has of its own, after the turns that both share."""
    _check_answers(rest, f"{column}, after what it shares with the other,")
    if rest[0]["role"] in ("system", "user"):
        raise BadRowError(
            f"{column} goes on with a message of role {rest[0]['role']} where the two part:"
            " they answer different questions"
        )
