"""A shard of a tokenized data set as a file that is mapped, not loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from lightning_modules.data.layout import Ids
from lightning_modules.data.tokenize import IGNORED, Example, Item, Pair, Tokenized


class StoredShard:
    """A shard in a file: ids (t), whether each is learned (t), and where each sequence ends (s).

    :param item: makes an item of its sequences.
    :param references: file of the scored tokens' reference log-probabilities (n), not a number where there is
        none yet; None or missing has none.
    """

    def __init__(self, file: Path, item: Callable[..., Item], references: Path | None = None) -> None:
        opened: Any = safe_open(file, framework="numpy")
        self._file = opened
        self._item = item
        facts = self._file.metadata()
        self.bad: dict[int, str] = {int(number): why for number, why in json.loads(facts["bad"]).items()}
        self.cut = int(facts["cut"])
        self._each = int(facts["sequences"])
        self._ends: Ids = self._file.get_tensor("ends")
        self._references: Any = None
        if references is not None and is_whole(references):
            self._references = safe_open(references, framework="numpy")

    def __len__(self) -> int:
        return len(self._ends) // self._each

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        sizes = np.diff(self._ends, prepend=0).reshape(-1, self._each).sum(1)
        return cast(list[int], sizes.tolist())

    def __getitem__(self, index: int) -> Item:
        first = range(len(self))[index] * self._each
        start, ends = _start(self._ends, first), self._ends[first : first + self._each]
        at = slice(start, int(ends[-1]))
        ids = self._file.get_slice("ids")[at].astype(np.int64)
        labels = np.where(self._file.get_slice("learned")[at], ids, IGNORED)
        cuts = ends[:-1] - start
        parts = zip(np.split(ids, cuts), np.split(labels, cuts), strict=True)
        item = self._item(*(Example(*part) for part in parts))
        if isinstance(item, Pair):
            item.reference = self._reference(index)
        return item

    @cached_property
    def _scored_ends(self) -> Ids:
        """How many tokens are scored up to each sequence's end (s)."""
        return cast(Ids, self._file.get_tensor("scored_ends"))

    def scored_span(self, index: int) -> tuple[int, int]:
        """Return where an item's scored tokens stand among all of the shard."""
        first = index * self._each
        return _start(self._scored_ends, first), int(self._scored_ends[first + self._each - 1])

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return int(self._scored_ends[-1]) if len(self) else 0

    def _reference(self, index: int) -> Tensor | None:
        if self._references is None:
            return None
        start, end = self.scored_span(index)
        values = torch.from_numpy(self._references.get_slice("log_probs")[start:end])
        return None if values.isnan().any() else values

    def all_references(self) -> NDArray[np.float32]:
        """Return those of all scored tokens (n)."""
        if self._references is None:
            return np.full(self.scored, np.nan, dtype=np.float32)
        return cast(NDArray[np.float32], self._references.get_tensor("log_probs"))


def _start(ends: Ids, index: int) -> int:
    return int(ends[index - 1]) if index else 0


def is_whole(file: Path) -> bool:
    """Whether there is such a file, and a disk that was full or a crash has not left a part of it."""
    try:
        with safe_open(file, framework="numpy"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False


def write_shard(file: Path, tokenized: Tokenized) -> None:
    """Write what :class:`StoredShard` reads."""
    examples = [example for row in tokenized.rows for example in row]
    empty: list[Ids] = [np.zeros(0, dtype=np.int64)]
    ids = np.concatenate(empty + [example.ids for example in examples])
    labels = np.concatenate(empty + [np.asarray(example.labels) for example in examples])
    ends = np.cumsum([len(example) for example in examples], dtype=np.int64)
    learned = labels != IGNORED
    scored = np.concatenate([[0], np.cumsum(learned, dtype=np.int64)])
    tensors = {"ids": ids.astype(np.int32), "learned": learned, "ends": ends, "scored_ends": scored[ends]}
    facts = {
        "bad": json.dumps(tokenized.bad),
        "cut": str(tokenized.cut),
        "sequences": str(len(tokenized.rows[0]) if tokenized.rows else 1),
    }
    save_file(tensors, file, facts)
