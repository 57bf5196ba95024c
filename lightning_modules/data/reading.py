"""Read a data set's rows from a path or URI, with a digest of what was read."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, unquote_to_bytes, urlsplit

from post_training.errors import DataError


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


@dataclass(frozen=True)
class RawDataset:
    """A data set's rows, bad ones included, with the SHA-256 of its content."""

    source: str
    digest: str
    rows: list[Row]


def read_dataset(source: str) -> RawDataset:
    """Read jsonl, json, csv or parquet rows from an absolute path or a URI.

    :param source: a path; ``file:``, ``data:``, ``huggingface://datasets/ORG/NAME?split=…``,
        or any other scheme that fsspec knows (https, s3, …).
    :raises DataError: if it cannot be read, has an unknown kind, or holds no row.
    """
    scheme = urlsplit(source).scheme
    try:
        dataset = _read_hub(source) if scheme == "huggingface" else _read_file(source, scheme)
    except DataError:
        raise
    except Exception as error:  # any file system's or parser's own error
        raise DataError(f"cannot read the data set {_shown(source)}: {_first_line(error)}") from error
    if not dataset.rows:
        raise DataError(f"the data set {_shown(source)} holds no rows")
    return dataset


def _read_file(source: str, scheme: str) -> RawDataset:
    if scheme == "data":
        content, kind = _decode_data_uri(source)
    else:
        content, kind = _fetch(source, scheme), _kind_of_name(source)
    return RawDataset(_shown(source), hashlib.sha256(content).hexdigest(), PARSERS[kind](content))


def _fetch(source: str, scheme: str) -> bytes:
    if not scheme:
        return _read_path(Path(source))
    if scheme == "file":
        return _read_path(Path(unquote(urlsplit(source).path)))
    import fsspec  # noqa: PLC0415 - only remote data needs it

    # A redirect could lead to an address that the request was not allowed to name.
    options = {"allow_redirects": False} if scheme == "https" else {}
    with fsspec.open(source, "rb", **options) as file:
        return bytes(file.read())


def _read_path(path: Path) -> bytes:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"the data set {path} {what}")
    return path.read_bytes()


def _kind_of_name(source: str) -> str:
    suffix = Path(urlsplit(source).path if "://" in source else source).suffix.lower().lstrip(".")
    kind = SUFFIXES.get(suffix)
    if kind is None:
        raise DataError(
            f"the data set {_shown(source)} has the unknown suffix {suffix!r}: use {', '.join(SUFFIXES)}"
        )
    return kind


def _decode_data_uri(uri: str) -> tuple[bytes, str]:
    """Split an RFC 2397 URI into its bytes and the kind that its media type names (jsonl where none does)."""
    header, comma, body = uri.removeprefix("data:").partition(",")
    if not comma:
        raise DataError("the data: URI has no comma between its media type and its content")
    media, *parameters = header.lower().split(";")
    content = unquote_to_bytes(body)
    if "base64" in parameters:
        content = base64.b64decode(content, validate=True)
    kinds = {"text/csv": "csv", "csv": "csv", "application/json": "json"}
    return content, kinds.get(media, "jsonl")


def _read_hub(source: str) -> RawDataset:
    """Read ``huggingface://datasets/ORG/NAME?split=train`` with the datasets library."""
    from datasets import load_dataset  # noqa: PLC0415 - seconds, only hub data needs it

    parts = urlsplit(source)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    name = parts.path.strip("/")
    table = load_dataset(name, query.get("name"), split=query.get("split", "train"))
    rows = _number(table)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.value, sort_keys=True, default=str).encode())
    return RawDataset(source, digest.hexdigest(), rows)


def _parse_jsonl(content: bytes) -> list[Row]:
    lines = content.decode("utf-8-sig").split("\n")
    return [_parse_line(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_line(number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON: {error.msg} at column {error.colno}")
    return _as_row(number, value)


def _as_row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, f"must be an object, got {type(value).__name__}")
    return Row(number, value)


def _parse_json(content: bytes) -> list[Row]:
    """Read a list of objects, an object that holds one under ``data`` or ``rows``, or JSON lines."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError:
        return _parse_jsonl(content)
    if isinstance(value, dict):
        lists = [value[key] for key in ("data", "rows") if isinstance(value.get(key), list)]
        value = lists[0] if lists else [value]
    if not isinstance(value, list):
        raise ValueError(f"must hold a list of objects, got {type(value).__name__}")
    return _number(value)


def _parse_csv(content: bytes) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    return [
        Row(number, {}, "has more cells than the header")
        if None in value
        else Row(number, {key: cell for key, cell in value.items() if cell not in (None, "")})
        for number, value in enumerate(reader, start=1)
    ]


def _parse_parquet(content: bytes) -> list[Row]:
    from pyarrow import parquet  # noqa: PLC0415 - only parquet needs it

    return _number(parquet.read_table(io.BytesIO(content)).to_pylist())


def _number(values: Iterable[Any]) -> list[Row]:
    return [_as_row(number, value) for number, value in enumerate(values, start=1)]


PARSERS: dict[str, Callable[[bytes], list[Row]]] = {
    "jsonl": _parse_jsonl,
    "json": _parse_json,
    "csv": _parse_csv,
    "parquet": _parse_parquet,
}
"""Parser of each kind of file."""

SUFFIXES = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "parquet": "parquet"}


def _shown(source: str) -> str:
    """Leave out what may hold rows or a secret: the body of a data: URI, a query, a password."""
    if source.startswith("data:"):
        return source.partition(",")[0]
    parts = urlsplit(source)
    if not parts.scheme or parts.scheme == "huggingface":
        return source
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
