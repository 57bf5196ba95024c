"""Turns become token ids, with labels on the tokens that are learned."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_modules.data.formats import FORMATS, BadRowError, Turn
from lightning_modules.data.reading import RawDataset
from post_training.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position whose token is not scored."""

REPORTED_ROWS = 20
BATCH_ROWS = 1000


@dataclass(frozen=True)
class Example:
    """One tokenized conversation.

    :param input_ids: token ids, length n.
    :param labels: the same ids where the token is scored, else -100; length n. The first is never
        scored: nothing comes before it.
    """

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the character spans whose tokens are learned."""

    text: str
    spans: list[tuple[int, int]]


def tokenize_dataset(
    dataset: RawDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_format: str,
    max_seq_length: int,
    train_on_input: bool = False,
    max_bad_row_fraction: float = 0.0,
) -> list[Example]:
    """Turn each row into an example, in file order.

    :param max_seq_length: tokens; longer rows are cut at the end.
    :param max_bad_row_fraction: bad rows up to this share are skipped and counted in the log.
    :raises DataError: naming the first bad rows and their reasons, if more than that share are bad.
    """
    bad: dict[int, str] = {}
    rendered: dict[int, Rendered] = {}
    for row in dataset.rows:
        try:
            if row.error is not None:
                raise BadRowError(row.error)
            rendered[row.number] = render(tokenizer, FORMATS[data_format](row.value), train_on_input)
        except BadRowError as reason:
            bad[row.number] = str(reason)
    examples = _tokenize_all(tokenizer, rendered, max_seq_length, bad)
    _check_bad_rows(dataset, bad, max_bad_row_fraction)
    return examples


def _tokenize_all(
    tokenizer: PreTrainedTokenizerBase,
    rendered: dict[int, Rendered],
    max_seq_length: int,
    bad: dict[int, str],
) -> list[Example]:
    """Tokenize in batches; rows left without a scored token are added to ``bad``."""
    examples = []
    numbers = list(rendered)
    for start in range(0, len(numbers), BATCH_ROWS):
        batch = numbers[start : start + BATCH_ROWS]
        encoded = tokenizer(
            [rendered[n].text for n in batch], add_special_tokens=False, return_offsets_mapping=True
        )
        for i, number in enumerate(batch):
            example = label(encoded["input_ids"][i], encoded["offset_mapping"][i], rendered[number].spans)
            cut = Example(example.input_ids[:max_seq_length], example.labels[:max_seq_length])
            if any(token != IGNORED for token in cut.labels):
                examples.append(cut)
            else:
                bad[number] = f"the prompt is longer than max_seq_length ({max_seq_length} tokens)"
    return examples


def _check_bad_rows(dataset: RawDataset, bad: dict[int, str], max_fraction: float) -> None:
    if not bad:
        return
    report = "; ".join(f"row {number}: {bad[number]}" for number in sorted(bad)[:REPORTED_ROWS])
    more = f"; and {len(bad) - REPORTED_ROWS} more" if len(bad) > REPORTED_ROWS else ""
    summary = f"{len(bad)} of {len(dataset.rows)} rows of {dataset.source} are bad"
    if len(bad) / len(dataset.rows) > max_fraction:
        raise DataError(f"{summary}: {report}{more}")
    log.warning("%s and were skipped: %s%s", summary, report, more)


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], train_on_input: bool = False
) -> Rendered:
    """Render a conversation with the chat template and find the learned spans in its text.

    A learned turn's span begins where the text up to it, generation prompt included, ends, and runs
    through the turn's own end token: what a model has to write when it answers.

    :raises BadRowError: if the template refuses the conversation, or renders its beginning
        differently once more turns follow, so that the turns cannot be told apart.
    """
    messages = [turn.message for turn in turns]
    text = _apply(tokenizer, messages)
    if train_on_input:
        return Rendered(text, [(0, len(text))])
    spans = [_span(tokenizer, messages, i, text) for i, turn in enumerate(turns) if turn.train]
    return Rendered(text, spans)


def _span(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], i: int, text: str
) -> tuple[int, int]:
    """Find the characters ``[start, end)`` of turn ``i`` in the whole text."""
    before = _apply(tokenizer, messages[:i], add_generation_prompt=True) if i else ""
    through = text if i == len(messages) - 1 else _apply(tokenizer, messages[: i + 1])
    if not text.startswith(through) or not through.startswith(before):
        raise BadRowError(
            f"the chat template renders the turns up to message {i} differently inside the whole"
            " conversation, so the answer's tokens cannot be told apart"
        )
    return len(before), _end_of_turn(tokenizer, through)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, through: str) -> int:
    """Leave out white space after the turn's end token: generation has stopped by then."""
    stripped = through.rstrip()
    ended = any(stripped.endswith(token) for token in tokenizer.all_special_tokens)
    return len(stripped) if ended else len(through)


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], add_generation_prompt: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except Exception as error:  # a template raises what it likes
        reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise BadRowError(f"the chat template refuses it: {reason}") from error


def label(
    input_ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Example:
    """Score each token that begins inside a span.

    :param offsets: each token's characters ``[start, end)``, as the tokenizer gives them.
    :param spans: learned characters ``[start, end)``, in order and apart.
    """
    labels = [IGNORED] * len(input_ids)
    span = 0
    for position, (start, end) in enumerate(offsets):
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        if span < len(spans) and start >= spans[span][0] and end > start and position > 0:
            labels[position] = input_ids[position]
    return Example(list(input_ids), labels)
