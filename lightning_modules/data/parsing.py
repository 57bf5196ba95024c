"""Rows of each kind of file."""

from __future__ import annotations

import csv
import io
import json
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lightning_modules.data.content import Content, LazyRows, Row
from lightning_modules.data.sources import Limits

BATCH_ROWS = 1000
"""Rows of columnar data that are read together."""


class UnpackedError(Exception):
    """A file holds more than its content's size tells, and more than the limit."""


def _parse_jsonl(content: Content, limits: Limits) -> Sequence[Row]:
    """Find the lines that hold something; they are parsed when they are asked for."""
    starts, ends, numbers = array("q"), array("q"), array("q")
    end = 0
    with content.open() as file:
        for number, line in enumerate(file, start=1):
            start, end = end, end + len(line)
            if number == 1 and line.startswith(BOM_UTF8):
                start += len(BOM_UTF8)
                line = line.removeprefix(BOM_UTF8)
            if line.decode().strip():
                starts.append(start)
                ends.append(end)
                numbers.append(number)

    def read(first: int, last: int) -> list[Row]:
        if first == last:
            return []
        offset = starts[first]
        block = content.read(offset, ends[last - 1])
        return [
            _parse_line(numbers[i], block[starts[i] - offset : ends[i] - offset].decode())
            for i in range(first, last)
        ]

    return LazyRows(len(starts), read)


def _parse_line(number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        return Row(number, {}, f"not JSON: {error}")
    return _as_row(number, value)


def _as_row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, f"must be an object, got {type(value).__name__}")
    return Row(number, value)


def _parse_json(content: Content, limits: Limits) -> Sequence[Row]:
    """Read a list of objects, an object that holds one under ``data`` or ``rows``, or JSON lines."""
    try:
        with content.open() as file:
            value = json.loads(file.read().decode("utf-8-sig"))
    except json.JSONDecodeError:
        return _parse_jsonl(content, limits)
    if isinstance(value, dict):
        lists = [value[key] for key in ("data", "rows") if isinstance(value.get(key), list)]
        value = lists[0] if lists else [value]
    if not isinstance(value, list):
        raise ValueError(f"must hold a list of objects, got {type(value).__name__}")
    return number_rows(value)


def _parse_csv(content: Content, limits: Limits) -> Sequence[Row]:
    """Read rows under a header; empty cells are left out, as a column that a row lacks."""
    csv.field_size_limit(2**31 - 1)
    # Not strict, a quote that is never closed would swallow the rest of the file.
    text = io.TextIOWrapper(content.open(), encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    columns = [column for column in reader.fieldnames or () if column]
    if len(set(columns)) < len(columns):
        raise ValueError(f"a column's name is there twice: {', '.join(columns)[:200]}")
    try:
        return [_csv_row(number, value) for number, value in enumerate(reader, start=1)]
    except csv.Error as error:
        raise ValueError(f"line {reader.reader.line_num}: {error}") from None


def _csv_row(number: int, value: dict[Any, Any]) -> Row:
    if None in value:
        return Row(number, {}, "has more cells than the header")
    return Row(number, {column: cell for column, cell in value.items() if cell not in (None, "")})


def _parse_parquet(content: Content, limits: Limits) -> Sequence[Row]:
    """Read a file that was fetched only if what it holds, unpacked, has the limit too, a byte a row at least.

    A few bytes can stand for any number of rows: a batch has as many as cannot be over the limit together.
    The batches are copied to a file without a name, from which each can be read alone.
    """
    import pyarrow  # noqa: PLC0415 - only parquet needs it
    from pyarrow import parquet  # noqa: PLC0415

    file = parquet.ParquetFile(content.open())
    groups = [file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)]
    limit = limits.max_bytes
    if sum(groups) > limit or file.metadata.num_rows > limit:
        raise UnpackedError
    rows = min(BATCH_ROWS, max(1, limit // max([1, *groups])))
    starts, ends = [0], [0]

    def parts() -> Iterator[bytes]:
        unpacked = 0
        for batch in file.iter_batches(rows):
            unpacked += batch.nbytes
            if unpacked > limit:
                raise UnpackedError
            part = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(part, batch.schema) as stream:
                stream.write_batch(batch)
            content = part.getvalue().to_pybytes()
            starts.append(starts[-1] + len(batch))
            ends.append(ends[-1] + len(content))
            yield content

    batches = Content.of_parts(parts(), limits.folder)

    def read(first: int, last: int) -> list[Row]:
        found: list[Row] = []
        while first < last:
            number = bisect_right(starts, first) - 1
            with pyarrow.ipc.open_stream(batches.read(ends[number], ends[number + 1])) as stream:
                part = stream.read_all().slice(first - starts[number], last - first)
            found += number_rows(map(without_nulls, part.to_pylist()), first)
            first += len(part)
        return found

    return LazyRows(starts[-1], read)


def without_nulls(value: Any) -> Any:
    """Leave out the keys with which columnar files fill an object that lacks them, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def number_rows(values: Iterable[Any], before: int = 0) -> list[Row]:
    """Return the values as rows, numbered from 1 on, or from behind so many others."""
    return [_as_row(number, value) for number, value in enumerate(values, start=before + 1)]


PARSERS: dict[str, Callable[[Content, Limits], Sequence[Row]]] = {
    "jsonl": _parse_jsonl,
    "json": _parse_json,
    "csv": _parse_csv,
    "parquet": _parse_parquet,
}
"""Parser of each kind of file, of its content and the limits of what that may unpack to; text is as it is."""

SUFFIXES = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "parquet": "parquet"}
