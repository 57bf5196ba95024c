"""Turns become token ids, with labels on the tokens that are learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lightning_modules.data.content import RawDataset, Row
from lightning_modules.data.formats import Turn, tools_of
from lightning_modules.data.layout import Ids
from lightning_modules.data.messages import BadRowError
from post_training.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position whose token is not scored."""

REPORTED_ROWS = 20
BATCH_ROWS = 1000

MARKER = "\ue000marked turn\ue001"
"""Stands in for a turn's content while its place is looked for; of characters that no text has."""

Tools = list[dict[str, Any]] | None
"""The JSON schemas of the functions that the assistant may call."""


@dataclass(frozen=True)
class Example:
    """One tokenized conversation.

    :param input_ids: token ids, length n.
    :param labels: the same ids where the token is scored, else -100; length n. The first is never
        scored: nothing comes before it.
    """

    input_ids: list[int] | Ids
    labels: list[int] | Ids

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences that the model sees."""
        return (self,)

    @property
    def scored(self) -> int:
        """How many of its tokens are scored."""
        return len(self.scored_places)

    @property
    def ids(self) -> Ids:
        """Its tokens as an array (n)."""
        return np.asarray(self.input_ids)

    @property
    def scored_places(self) -> Ids:
        """Positions of its scored tokens, ascending."""
        return np.flatnonzero(np.asarray(self.labels) != IGNORED)


@dataclass
class Pair:
    """Two tokenized conversations with the same prompt.

    :param reference: log-probabilities of the scored tokens under the reference model, those of the chosen
        answer first (n); None until they are computed.
    """

    chosen: Example
    rejected: Example
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences that the model sees."""
        return (self.chosen, self.rejected)


Item = Example | Pair
"""What a row becomes."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the character spans whose tokens are learned."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenized:
    """The rows of a data set that can be used, and the others.

    :param rows: for each usable row, in file order, its conversations.
    :param bad: row number -> why it cannot be used.
    :param cut: how many of the usable rows were longer than the limit.
    """

    rows: list[tuple[Example, ...]]
    bad: dict[int, str]
    cut: int


def tokenize_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    conversations: Callable[[Mapping[str, Any]], Sequence[Sequence[Turn]]],
    *,
    max_seq_length: int,
    train_on_input: bool = False,
    vocab_size: int | None = None,
) -> Tokenized:
    """Tokenize each row's conversations.

    :param conversations: reads a row, or raises BadRowError.
    :param max_seq_length: tokens; longer conversations are cut at the end.
    :param vocab_size: tokens that the model knows; None is those of the tokenizer.
    """
    bad: dict[int, str] = {}
    rendered: dict[int, list[Rendered]] = {}
    for row in rows:
        try:
            if row.error is not None:
                raise BadRowError(row.error)
            read, tools = conversations(row.value), tools_of(row.value)
            rendered[row.number] = [render(tokenizer, turns, train_on_input, tools) for turns in read]
        except BadRowError as reason:
            bad[row.number] = str(reason)
    usable, cut = [], 0
    for number, whole in _tokenize_all(tokenizer, rendered):
        examples = tuple(Example(e.input_ids[:max_seq_length], e.labels[:max_seq_length]) for e in whole)
        problem = _problem(examples, max_seq_length, vocab_size or len(tokenizer))
        if problem is None:
            usable.append(examples)
            cut += any(len(example) > max_seq_length for example in whole)
        else:
            bad[number] = problem
    return Tokenized(usable, bad, cut)


def _problem(examples: Sequence[Example], max_seq_length: int, vocab_size: int) -> str | None:
    """Say why a row's examples cannot be trained on, None if they can."""
    if not all(example.scored for example in examples):
        return f"the prompt is longer than max_seq_length ({max_seq_length} tokens)"
    first, *others = examples
    if others and all(np.array_equal(first.ids, other.ids) for other in others):
        return f"its answers are the same within max_seq_length ({max_seq_length} tokens)"
    largest = max(int(example.ids.max()) for example in examples)
    return f"has the token {largest}, and the model knows {vocab_size}" if largest >= vocab_size else None


def _tokenize_all(
    tokenizer: PreTrainedTokenizerBase, rendered: Mapping[int, Sequence[Rendered]]
) -> Iterator[tuple[int, list[Example]]]:
    """Yield each row's number and examples; the tokenizer is called for many rows at once."""
    numbers = list(rendered)
    for start in range(0, len(numbers), BATCH_ROWS):
        batch = numbers[start : start + BATCH_ROWS]
        texts = [text for number in batch for text in rendered[number]]
        encoded = tokenizer(
            [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True
        )
        examples = (
            label(ids, offsets, text.spans)
            for ids, offsets, text in zip(encoded["input_ids"], encoded["offset_mapping"], texts, strict=True)
        )
        for number in batch:
            yield number, list(islice(examples, len(rendered[number])))


def check_bad_rows(
    dataset: RawDataset,
    bad: Mapping[int, str],
    max_fraction: float,
    field: str = "runtime.max_bad_row_fraction",
) -> str | None:
    """Return what is said of rows that are skipped, None where there are none.

    :param max_fraction: bad rows up to this share are skipped.
    :param field: where that was said.
    :raises DataError: naming the first bad rows and their reasons, if more than that share are bad.
    """
    if not bad:
        return None
    report = "; ".join(f"row {number}: {bad[number]}" for number in sorted(bad)[:REPORTED_ROWS])
    more = f"; and {len(bad) - REPORTED_ROWS} more" if len(bad) > REPORTED_ROWS else ""
    summary = f"{len(bad)} of {len(dataset.rows)} rows of {dataset.source} are bad"
    if len(bad) / len(dataset.rows) > max_fraction:
        raise DataError(f"{summary} and {field} is {max_fraction:g}: {report}{more}")
    return f"{summary} and were skipped: {report}{more}"


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    train_on_input: bool = False,
    tools: Tools = None,
) -> Rendered:
    """Render a conversation with the chat template and find the learned spans in its text.

    A learned turn's span begins where the text up to it, generation prompt included, ends, and runs
    through the turn's own end token: what a model has to write when it answers.

    :param tools: the functions that the assistant may call, as their JSON schemas.
    :raises BadRowError: if the template refuses the conversation, leaves the tools out, or renders the
        conversation's beginning differently once more turns follow, so that the turns cannot be told apart.
    """
    template = _Template(tokenizer, tools)
    messages = [turn.message for turn in turns]
    text = template.apply(messages)
    if tools and text == _Template(tokenizer, None).apply(messages):
        raise BadRowError("the chat template has no place for tools, and the row has some")
    if train_on_input:
        return Rendered(text, [(0, len(text))])
    spans = [template.span(messages, i, text) for i, turn in enumerate(turns) if turn.train]
    return Rendered(text, spans)


@dataclass(frozen=True)
class _Template:
    """A tokenizer's chat template with the tools of one row."""

    tokenizer: PreTrainedTokenizerBase
    tools: Tools

    def span(self, messages: list[dict[str, Any]], i: int, text: str) -> tuple[int, int]:
        """Find the characters ``[start, end)`` of turn ``i`` in the whole text."""
        before = self.apply(messages[:i], add_generation_prompt=True) if i else ""
        through = text if i == len(messages) - 1 else self.apply(messages[: i + 1])
        if text.startswith(through) and through.startswith(before):
            return len(before), self._end_of_turn(through)
        return self._marked_span(messages, i, text)

    def _marked_span(self, messages: list[dict[str, Any]], i: int, text: str) -> tuple[int, int]:
        """Find a turn by its content, where the template renders it differently at the end (Qwen 3 does)."""
        content = messages[i].get("content", "")
        marked = self.apply([*messages[:i], {**messages[i], "content": MARKER}, *messages[i + 1 :]])
        if (
            messages[i].get("tool_calls")
            or marked.count(MARKER) != 1
            or marked.replace(MARKER, content) != text
        ):
            raise BadRowError(
                f"the chat template renders the turns up to message {i} differently inside the whole"
                " conversation, so the answer's tokens cannot be told apart"
            )
        start = marked.index(MARKER)
        end = start + len(content)
        ends = [token for token in self.tokenizer.all_special_tokens if text.startswith(token, end)]
        return start, end + max(map(len, ends), default=0)

    def _end_of_turn(self, through: str) -> int:
        """Leave out white space after the turn's end token: generation has stopped by then."""
        stripped = through.rstrip()
        ended = any(stripped.endswith(token) for token in self.tokenizer.all_special_tokens)
        return len(stripped) if ended else len(through)

    def apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """Render messages, or turn whatever the template raises into a bad row."""
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=cast(Any, self.tools),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
            text.encode()  # the tokenizer cannot take half a surrogate pair
        except Exception as error:  # a template raises what it likes
            reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
            raise BadRowError(f"the chat template refuses it: {reason}") from error
        return text


def label(
    input_ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Example:
    """Score each token that begins inside a span.

    :param offsets: each token's characters ``[start, end)``, as the tokenizer gives them.
    :param spans: learned characters ``[start, end)``, in order and apart.
    """
    ids = np.array(input_ids)
    starts, ends = np.array(offsets).reshape(-1, 2).T
    learned = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        learned |= (starts >= first) & (starts < last)
    learned &= ends > starts
    learned[:1] = False
    return Example(ids, np.where(learned, ids, IGNORED))
