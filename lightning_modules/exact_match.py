"""Generated answers against expected ones, by what a pattern finds in both."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.data.content import Row
from lightning_modules.data.formats import Turn, tools_of
from lightning_modules.data.messages import BadRowError, Message
from lightning_modules.data.shards import Conversations
from lightning_modules.data.tokenize import Tools
from lightning_modules.generation import answers, max_positions, prompt_ids


@dataclass(frozen=True)
class Question:
    """A row whose answer is generated.

    :param messages: the turns before the last learned one.
    :param expected: the text of that one.
    :param tools: functions that the assistant may call.
    """

    messages: list[Message]
    expected: str
    tools: Tools = None

    @property
    def text(self) -> str:
        """The last message's text, for people."""
        return str(self.messages[-1]["content"]) if self.messages else ""


def questions_of(rows: Iterable[Row], conversations: Conversations) -> dict[int, Question]:
    """Read the questions of rows, by the rows' numbers; one that cannot be read has none.

    :param conversations: reads a row's conversations; the first is taken, of a preference the chosen one.
    """
    found = {}
    for row in rows:
        with suppress(BadRowError):
            turns, *_ = conversations(row.value)
            found[row.number] = _question(turns, tools_of(row.value))
    return found


def _question(turns: Sequence[Turn], tools: Tools) -> Question:
    last = max(i for i, turn in enumerate(turns) if turn.train)
    return Question([turn.message for turn in turns[:last]], str(turns[last].message["content"]), tools)


def answers_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[int, Question],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[int, str]:
    """Let a model answer, prompts of like length together; one that leaves no room has the empty answer.

    :param model: in evaluation mode.
    """
    ids = {
        number: prompt_ids(tokenizer, question.messages, question.tools)
        for number, question in questions.items()
    }
    room = max_positions(model) or math.inf
    short = sorted((number for number in ids if len(ids[number]) < room), key=lambda number: len(ids[number]))
    found = dict.fromkeys(ids, "")
    for start in range(0, len(short), batch_size):
        numbers = short[start : start + batch_size]
        given = answers(model, tokenizer, [ids[number] for number in numbers], max_new_tokens)
        found |= zip(numbers, given, strict=True)
    return found


def is_right(pattern: str, answer: str, expected: str) -> bool:
    """Whether the pattern finds the same in an answer as in the expected one, and finds something."""
    value = extracted(pattern, expected)
    return value is not None and extracted(pattern, answer) == value


def extracted(pattern: str, text: str) -> str | None:
    """Return what a pattern's first group, or the whole of it, matches last; None where nothing does.

    Commas, outer white space and a full stop at the end are left out: 1,234. is 1234.
    """
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    value = matches[-1].group(1 if matches[-1].re.groups else 0)
    return None if value is None else value.replace(",", "").strip().rstrip(".")
