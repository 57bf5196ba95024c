"""Read a data set's rows from a path or URI, with a digest of what was read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from lightning_modules.data.content import Content, RawDataset
from lightning_modules.data.hub import read_hub
from lightning_modules.data.parsing import PARSERS, SUFFIXES, UnpackedError
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
    except UnpackedError:
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


READERS: dict[str, Callable[[str, Limits], RawDataset]] = {
    "data": _read_data_uri,
    "huggingface": read_hub,
}
"""Reader of each scheme whose content is no file with a name."""
