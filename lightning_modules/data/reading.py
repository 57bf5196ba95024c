"""Read a data set's rows from a path or URI, with a digest of what was read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lightning_modules.data.content import Content, LazyRows, Row
from lightning_modules.data.sources import (
    DEFAULT_LIMITS,
    LOCAL_SCHEMES,
    Limits,
    fetch,
    first_line,
    shown,
    too_large,
)
from post_training.data_uris import parse_data_uri
from post_training.errors import DataError
from post_training.uris import HUB_QUERY

BATCH_ROWS = 1000


@dataclass(frozen=True)
class RawDataset:
    """A data set's rows, bad ones included, with the SHA-256 of its content.

    Rows of jsonl, parquet and the hub are read when they are asked for; of json and csv all are in memory.
    """

    source: str
    digest: str
    rows: Sequence[Row]


def read_dataset(
    source: str,
    tracking_uri: str | None = None,
    roots: Sequence[Path] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> RawDataset:
    """Read jsonl, json, csv or parquet rows from an absolute path or a URI.

    :param source: a path; ``data:``, ``huggingface://datasets/ORG/NAME?split=…&name=…``, or what
        ``sources.fetch`` takes (``file:``, ``https:``, ``s3:``, ``runs:``, …).
    :param tracking_uri: of the job's MLflow server, for ``runs:``, ``models:`` and ``mlflow-artifacts:``.
    :param roots: where on this machine a file may lie, as for ``sources.fetch``.
    :param limits: of what is fetched from elsewhere or sent, for parquet also of what it unpacks to.
    :raises DataError: if it cannot be read, has an unknown kind, or holds no row; its cause is an OSError
        where another attempt may succeed.
    """
    read = READERS.get(urlsplit(source).scheme)
    try:
        dataset = read(source, limits) if read else _read_file(source, tracking_uri, roots, limits)
    except DataError:
        raise
    except Exception as error:  # any file system's or parser's own error
        raise DataError(f"cannot read the data set {shown(source)}: {first_line(error)}") from error
    if not dataset.rows:
        raise DataError(f"the data set {shown(source)} holds no rows")
    return dataset


def _read_file(source: str, tracking_uri: str | None, roots: Sequence[Path], limits: Limits) -> RawDataset:
    kind = _kind_of_name(source)
    return _parse(source, fetch(source, tracking_uri, roots, limits), kind, limits)


def _parse(source: str, content: Content, kind: str, limits: Limits) -> RawDataset:
    """Parse a file's content, of which a local one has no limit."""
    local = urlsplit(source).scheme in LOCAL_SCHEMES
    try:
        rows = PARSERS[kind](content, replace(limits, max_bytes=sys.maxsize) if local else limits)
    except _UnpackedError:
        raise too_large(source, limits) from None
    return RawDataset(shown(source), content.digest(), rows)


def _kind_of_name(source: str) -> str:
    suffix = Path(urlsplit(source).path if "://" in source else source).suffix.lower().lstrip(".")
    kind = SUFFIXES.get(suffix)
    if kind is None:
        raise DataError(
            f"the data set {shown(source)} has the unknown suffix {suffix!r}: use {', '.join(SUFFIXES)}"
        )
    return kind


def _read_data_uri(uri: str, limits: Limits) -> RawDataset:
    """Read an RFC 2397 URI; its media type names the kind of file, jsonl where it names none of ours."""
    try:
        kind, sent = parse_data_uri(uri)
    except ValueError as error:
        raise DataError(str(error)) from None
    return _parse(uri, Content.of_parts([sent], limits.folder), kind, limits)


def _read_hub(source: str, limits: Limits) -> RawDataset:
    """Read a data set of the Hugging Face hub with the datasets library, which runs no code of theirs.

    The library fetches the files of all splits of a configuration, and these together have the limit.
    """
    from datasets import load_dataset_builder  # noqa: PLC0415 - seconds, only hub data needs it
    from datasets.exceptions import DatasetGenerationError  # noqa: PLC0415
    from huggingface_hub import HfFileSystem  # noqa: PLC0415

    name, query = _hub_address(source)
    # By its bare name the library would prefer a folder in the working folder.
    builder = load_dataset_builder(
        f"hf://datasets/{name}", query.get("name"), revision=_checked_revision(source, name)
    )
    hub = HfFileSystem()
    files = [file for split in (builder.config.data_files or {}).values() for file in split]
    if sum(hub.info(file)["size"] for file in files) > limits.max_bytes:
        raise too_large(source, limits)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:  # which says no more than that there is a cause
        raise error.__cause__ or error from None
    table = builder.as_dataset(query.get("split", "train"))
    digest = hashlib.sha256()
    for batch in table.with_format("arrow").iter(BATCH_ROWS):  # raw: a decoded image has no digest
        digest.update(json.dumps(batch.to_pylist(), sort_keys=True, default=str).encode())

    def read(start: int, end: int) -> list[Row]:
        return _number(map(_without_nulls, table.select(range(start, end))), start)

    return RawDataset(source, digest.hexdigest(), LazyRows(len(table), read))


def _checked_revision(source: str, name: str) -> str | None:
    """Return the commit that a hub data set is at, its cards checked; None where the hub is not asked.

    The library asks wherever a card says that the data files are, while it loads the card.

    :raises DataError: if that is outside the hub, or there is no such data set.
    """
    import yaml  # noqa: PLC0415 - only hub data needs them
    from huggingface_hub import DatasetCard, HfApi, hf_hub_download  # noqa: PLC0415
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415

    readers: dict[str, Callable[[Path], Any]] = {
        "README.md": lambda card: DatasetCard.load(card).data.to_dict(),
        ".huggingface.yaml": lambda card: yaml.safe_load(card.read_bytes()),
    }
    if HF_HUB_OFFLINE:
        return None
    with _hub_errors(source):
        revision = HfApi().dataset_info(name).sha
    for file, read in readers.items():
        try:
            with _hub_errors(source):
                card = Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
        except LocalEntryNotFoundError as error:
            raise ConnectionError(first_line(error)) from error
        except EntryNotFoundError:
            continue
        for place in _places(read(card)):
            if "::" in place or place.startswith("/") or urlsplit(place).scheme not in ("", "hf"):
                raise DataError(f"the data set {source} has a card that names data outside the hub")
    return revision


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Tell what another attempt would meet too from what it may overcome.

    :raises DataError: if there is no such data set, or it is gated.
    :raises ConnectionError: if the hub does not answer; its HTTP client's own errors are no OSErrors.
    """
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError  # noqa: PLC0415

    try:
        yield
    except RepositoryNotFoundError:
        raise DataError(f"the data set {source} is not on the hub, or may not be read") from None
    except (EntryNotFoundError, OSError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(first_line(error)) from error


def _places(card: Any) -> Iterator[str]:
    """Yield each file, pattern and folder that a card names."""
    configs = card.get("configs") if isinstance(card, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict):
            yield from _texts([config.get("data_files"), config.get("data_dir")])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif value is not None:
        yield str(value)


def _hub_address(source: str) -> tuple[str, dict[str, str]]:
    """Return ORG/NAME and the query.

    :raises DataError: if it has another form or asks for more than split and configuration.
    """
    parts = urlsplit(source)
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    query, name = dict(pairs), parts.path.strip("/")
    understood = len(query) == len(pairs) and query.keys() <= set(HUB_QUERY)
    if parts.netloc != "datasets" or name.count("/") != 1 or not understood:
        raise DataError(
            f"the data set {source} must have the form huggingface://datasets/ORG/NAME?split=train&name=CONFIG"
        )
    return name, query


class _UnpackedError(Exception):
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
    return _number(value)


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
        raise _UnpackedError
    rows = min(BATCH_ROWS, max(1, limit // max([1, *groups])))
    starts, ends = [0], [0]

    def parts() -> Iterator[bytes]:
        unpacked = 0
        for batch in file.iter_batches(rows):
            unpacked += batch.nbytes
            if unpacked > limit:
                raise _UnpackedError
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
            found += _number(map(_without_nulls, part.to_pylist()), first)
            first += len(part)
        return found

    return LazyRows(starts[-1], read)


def _without_nulls(value: Any) -> Any:
    """Leave out the keys with which columnar files fill an object that lacks them, at every depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _number(values: Iterable[Any], before: int = 0) -> list[Row]:
    return [_as_row(number, value) for number, value in enumerate(values, start=before + 1)]


READERS: dict[str, Callable[[str, Limits], RawDataset]] = {
    "data": _read_data_uri,
    "huggingface": _read_hub,
}
"""Reader of each scheme whose content is no file with a name."""

PARSERS: dict[str, Callable[[Content, Limits], Sequence[Row]]] = {
    "jsonl": _parse_jsonl,
    "json": _parse_json,
    "csv": _parse_csv,
    "parquet": _parse_parquet,
}
"""Parser of each kind of file, of its content and the limits of what that may unpack to; text is as it is."""

SUFFIXES = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "parquet": "parquet"}
