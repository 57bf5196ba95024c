"""Data sets as token ids, a few thousand rows at a time, in files that jobs share and map into memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors.numpy import save_file
from torch import Tensor

from lightning_modules.data.content import RawDataset, Row
from lightning_modules.data.formats import Turn
from lightning_modules.data.stored_shard import StoredShard, is_whole, write_shard
from lightning_modules.data.tokenize import (
    Item,
    Tokenized,
    check_bad_rows,
    tokenize_rows,
)
from lightning_modules.kept import Kept, alone, digest_of, make
from post_training.errors import DataError

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

    from transformers import PreTrainedTokenizerBase

SHARD_ROWS = 2**13
"""Rows that are tokenized before training begins: three seconds of work. Larger sets go on meanwhile."""

FORMAT = 1
"""Version of the files, and of how rows become tokens."""

OPEN_SHARDS = 2
"""Mapped at once: where training is, and where validation is."""

NICENESS = 10
"""Of the process that tokenizes ahead: a tenth of the processor time of what trains, or all that is idle."""

Conversations = Callable[[Mapping[str, Any]], Sequence[Sequence[Turn]]]
"""Reads a row's conversations, or raises BadRowError."""


class Shard(Protocol):
    """Neighbouring rows of a data set."""

    def __len__(self) -> int:
        """Return how many items there are."""

    def __getitem__(self, index: int, /) -> Item:
        """Return an item."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each item."""


class Shards(Protocol):
    """A data set in shards, in file order."""

    @property
    def counts(self) -> Sequence[int]:
        """Items of each shard."""

    @property
    def all_made(self) -> bool:
        """Whether no shard is left to make; the first one is always there."""

    def __getitem__(self, number: int, /) -> Shard:
        """Return a shard, made if it is not there.

        :raises DataError: if too many of its rows are bad.
        """

    def known_lengths(self) -> Iterator[int]:
        """Yield the tokens of each item of the shards that are made."""

    def check(self) -> str | None:
        """Say what was found wrong meanwhile.

        :raises DataError: if rows that come later are bad.
        """

    def make_ahead(self) -> None:
        """Make what is left while training goes on."""

    def close(self) -> None:
        """End that."""

    def computing_references(self, number: int, give_up: Callable[[], bool]) -> AbstractContextManager[None]:
        """Be the only process that computes a shard's reference log-probabilities."""

    def without_reference(self, number: int, indices: Sequence[int]) -> list[int]:
        """Return which pairs of a shard have no reference log-probabilities."""

    def forget(self, number: int) -> None:
        """Look again for a shard's reference log-probabilities: another process has computed some."""

    def set_references(self, number: int, indices: Sequence[int], log_probs: Tensor) -> None:
        """Keep reference log-probabilities.

        :param indices: of the pairs in a shard.
        :param log_probs: of their scored tokens, one pair after the other (n).
        """


@dataclass(frozen=True)
class Tokenizing:
    """How rows become items.

    :param form: names the method and the data format.
    :param conversations: what they read of a row.
    :param item: makes an item of a row's tokenized conversations.
    :param max_seq_length: tokens; longer conversations are cut at the end.
    :param vocab_size: tokens that the model knows.
    :param train_on_input: whether the prompt is learned too.
    """

    tokenizer: PreTrainedTokenizerBase
    form: str
    conversations: Conversations
    item: Callable[..., Item]
    max_seq_length: int
    vocab_size: int
    train_on_input: bool

    def digest(self, data: str) -> str:
        """Return what tells the outcome from others.

        :param data: digest of the data set.
        """
        tokenizer: Any = self.tokenizer
        template = tokenizer.chat_template
        today = datetime.now(UTC).date().isoformat() if "strftime_now" in str(template) else ""
        parts = (tokenizer.backend_tokenizer.to_str(), template, tokenizer.all_special_tokens, today)
        limits = (self.form, self.max_seq_length, self.vocab_size, self.train_on_input)
        return digest_of(FORMAT, SHARD_ROWS, data, parts, limits)

    def tokenized(self, rows: Iterable[Row]) -> Tokenized:
        """Tokenize rows."""
        return tokenize_rows(
            rows,
            self.tokenizer,
            self.conversations,
            max_seq_length=self.max_seq_length,
            vocab_size=self.vocab_size,
            train_on_input=self.train_on_input,
        )


@dataclass
class TokenizedRows:
    """A data set whose shards are tokenized when they are first asked for, or ahead by another process.

    :param max_bad_fraction: bad rows up to this share are skipped.
    :param tell_of_bad: is given the bad rows before an error names the first.
    """

    dataset: RawDataset
    tokenizing: Tokenizing
    kept: Kept
    max_bad_fraction: float = 0.0
    tell_of_bad: Callable[[Mapping[int, str]], None] = lambda bad: None
    bad: dict[int, str] = field(default_factory=dict, init=False)
    cut: int = field(default=0, init=False)
    counts: list[int] = field(init=False)
    """Items of each shard; of one that is not made yet its rows."""

    def __post_init__(self) -> None:
        rows = len(self.dataset.rows)
        self.counts = [min(SHARD_ROWS, rows - at) for at in range(0, rows, SHARD_ROWS)]
        self.digest = self.tokenizing.digest(self.dataset.digest)
        self._folder = self.kept.place("tokenized", self.digest)
        self._references: Path | None = None
        self._made: set[int] = set()
        self._open: dict[int, StoredShard] = {}
        self._process: ForkProcess | None = None

    @property
    def all_made(self) -> bool:
        """Whether no row is left to tokenize."""
        return len(self._made) == len(self.counts)

    def make(self, number: int) -> Path:
        """Tokenize a shard unless its file is there, and take note of its bad rows."""
        file = self._file(number)
        if number in self._made:
            return file
        if not is_whole(file):
            with alone(file):
                if not is_whole(file):
                    tokenized = self._tokenized(number)
                    make(file, lambda draft: write_shard(draft, tokenized))
        shard = StoredShard(file, self.tokenizing.item)
        self.bad |= shard.bad
        self.cut += shard.cut
        self.counts[number] = len(shard)
        self._made.add(number)
        return file

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"

    def _tokenized(self, number: int) -> Tokenized:
        start = number * SHARD_ROWS
        try:
            rows = self.dataset.rows[start : start + SHARD_ROWS]
        except OSError as error:
            raise DataError(f"cannot read the data set {self.dataset.source}: {error}") from error
        return self.tokenizing.tokenized(rows)

    def check(self) -> str | None:
        """Return what is said of bad rows that are skipped, None where there are none.

        :raises DataError: if those found so far are more than may be skipped.
        """
        while (number := self._first_unmade()) is not None and self._file(number).exists():
            self.make(number)
        try:
            return check_bad_rows(self.dataset, self.bad, self.max_bad_fraction)
        except DataError:
            self.tell_of_bad(self.bad)
            raise

    def _first_unmade(self) -> int | None:
        return None if self.all_made else min(set(range(len(self.counts))) - self._made)

    def __getitem__(self, number: int) -> StoredShard:
        file = self.make(number)
        self.check()
        if number not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            self._open[number] = StoredShard(file, self.tokenizing.item, self._references_of(number))
        return self._open[number]

    def known_lengths(self) -> Iterator[int]:
        """Yield the tokens of each item of the shards that are made."""
        for number in sorted(self._made):
            yield from StoredShard(self._file(number), self.tokenizing.item).lengths

    def keep_references(self, model: Any) -> None:
        """Look for reference log-probabilities, and keep them, by what tells their model from others."""
        self._references = self.kept.place("references", digest_of(self.digest, model))
        self._open.clear()  # opened without them

    @contextmanager
    def computing_references(self, number: int, give_up: Callable[[], bool]) -> Iterator[None]:
        """Be the only process that computes a shard's reference log-probabilities; those of others are seen.

        :param give_up: asked while another process does.
        """
        file = self._references_of(number)
        assert file is not None  # noqa: S101 - asked for by keep_references
        with alone(file, give_up):
            self.forget(number)
            yield

    def forget(self, number: int) -> None:
        """Look again for a shard's reference log-probabilities: another process has computed some."""
        self._open.pop(number, None)

    def without_reference(self, number: int, indices: Sequence[int]) -> list[int]:
        """Return which pairs of a shard have no reference log-probabilities."""
        shard = self[number]
        missing = np.isnan(shard.all_references())
        return [index for index in indices if missing[slice(*shard.scored_span(index))].any()]

    def set_references(self, number: int, indices: Sequence[int], log_probs: Tensor) -> None:
        """Keep reference log-probabilities.

        :param indices: of the pairs in a shard.
        :param log_probs: of their scored tokens, one pair after the other (n).
        """
        shard = self[number]
        values = shard.all_references()
        spans = [slice(*shard.scored_span(index)) for index in indices]
        parts = np.split(log_probs.numpy(), np.cumsum([span.stop - span.start for span in spans])[:-1])
        for span, part in zip(spans, parts, strict=True):
            values[span] = part
        file = self._references_of(number)
        assert file is not None  # noqa: S101 - asked for by keep_references
        make(file, lambda draft: save_file({"log_probs": values}, draft))
        del self._open[number]

    def _references_of(self, number: int) -> Path | None:
        return None if self._references is None else self._references / f"{number}.safetensors"

    def make_ahead(self) -> None:
        """Tokenize what is left in a process of its own, whose files are found by ``check``.

        A thread would share the interpreter with the training step. What the process cannot do is tried again
        here when it is needed.
        """
        if self.all_made or self._process is not None:
            return
        # Forked, as PyTorch's data loaders are: it begins with what is read and imported here.
        self._process = get_context("fork").Process(target=self._make_all, args=(os.getpid(),), daemon=True)
        self._process.start()

    def _make_all(self, parent: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if sys.platform == "linux":  # it holds what the trainer has open, the job's lock too
            from post_training.parent_death import die_with  # noqa: PLC0415 - of Linux alone

            die_with(parent)()
        os.nice(NICENESS)
        for number in range(len(self.counts)):
            if os.getppid() != parent:
                return
            if number not in self._made:
                self.make(number)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.join()
