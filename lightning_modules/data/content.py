"""An open file whose parts are read on demand, and rows that are made of them."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, overload

from post_training.errors import DataError

BLOCK_ROWS = 1000


class ContentChangedError(OSError):
    """A file was written to while it was read."""


class Content:
    """The bytes of a file, also of one that has lost its name.

    :param descriptor: open for reading; closed when nothing refers to the content any more.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._state = self._now()
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, file: IO[bytes]) -> Content:
        """Take an open file's content, whatever happens to the file."""
        return cls(os.dup(file.fileno()))

    @classmethod
    def of_parts(cls, parts: Iterable[bytes], folder: Path | None) -> Content:
        """Write parts one after the other into a file without a name, so that all are never in memory.

        :param folder: on whose disk it lies; None is the system's for such files.
        """
        with TemporaryFile(dir=folder) as file:
            file.writelines(parts)
            file.flush()
            return cls.of(file)

    def open(self) -> BufferedReader:
        """Return the file at its beginning; one position is shared by all that were opened."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return open(self._descriptor, "rb", closefd=False)

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` to before ``end``.

        :raises ContentChangedError: if the file is no longer what it was at first.
        """
        content = os.pread(self._descriptor, end - start, start)
        if self._now() != self._state or len(content) < end - start:
            raise ContentChangedError("the file was changed while it was read")
        return content

    def digest(self) -> str:
        """Return the SHA-256 in hexadecimal digits."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Row:
    """One row as it was read.

    :param number: line of a jsonl file, else position in the file; both from 1.
    :param value: the columns; empty where the row could not be read.
    :param error: why it could not be read.
    """

    number: int
    value: dict[str, Any]
    error: str | None = None


class LazyRows(Sequence[Row]):
    """Rows that are read when they are asked for, and not kept.

    :param count: of the rows.
    :param read: returns the rows from one index to before another.
    """

    def __init__(self, count: int, read: Callable[[int, int], list[Row]]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        blocks = range(0, self._count, BLOCK_ROWS)
        return chain.from_iterable(self[start : start + BLOCK_ROWS] for start in blocks)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, int):
            place = range(self._count)[index]
            return self[place : place + 1][0]
        start, end, step = index.indices(self._count)
        return self._read(start, max(start, end))[::step]


@dataclass(frozen=True)
class RawDataset:
    """A data set's rows, bad ones included, with the SHA-256 of its content.

    Rows of jsonl, parquet and the hub are read when they are asked for; of json and csv all are in memory.
    """

    source: str
    digest: str
    rows: Sequence[Row]


def blocks(dataset: RawDataset, limit: int | None = None) -> Iterator[Sequence[Row]]:
    """Yield the first rows, ``BLOCK_ROWS`` at a time.

    :param limit: how many; None is all of them.
    :raises DataError: if they can no longer be read.
    """
    end = len(dataset.rows) if limit is None else min(limit, len(dataset.rows))
    for start in range(0, end, BLOCK_ROWS):
        try:
            yield dataset.rows[start : min(start + BLOCK_ROWS, end)]
        except OSError as error:
            raise DataError(f"cannot read the data set {dataset.source}: {error}") from error
