"""Every kind of file and address, with one digest for one content."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_modules.data.reading import read_dataset
from post_training.errors import DataError

ROWS = [{"question": "a, b?", "answer": "1"}, {"question": 'say "é"', "answer": "2\n3"}]


JSONL = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n"


CSV = b'question,answer\n"a, b?",1\n"say ""\xc3\xa9""","2\n3"\n'


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """The bytes of a parquet file."""
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


PARQUET = parquet_of(ROWS)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", JSONL),
        ("rows.jsonl", b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n\r\n")),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps({"data": ROWS}).encode()),
        ("rows.json", JSONL),
        ("rows.ndjson", JSONL),
        ("rows.csv", CSV),
        ("rows.CSV", b"\xef\xbb\xbf" + CSV.replace(b",1\n", b",1\r\n").replace(b'"\n', b'"\r\n')),
        ("rows.csv", CSV.replace(b"answer\n", b"answer,,\n")),
        ("rows.parquet", PARQUET),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    for source in (str(path), path.as_uri()):
        dataset = read_dataset(source)
        assert [row.value for row in dataset.rows] == ROWS
        assert dataset.digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "uri",
    [
        "data:application/jsonl;base64," + base64.b64encode(JSONL).decode(),
        "data:text/csv;base64," + base64.b64encode(CSV).decode(),
        "data:csv;base64," + base64.b64encode(CSV).decode(),
        "DATA:Text/CSV;base64," + base64.b64encode(CSV).decode(),
        "data:application/vnd.apache.parquet;base64," + base64.b64encode(PARQUET).decode(),
        "data:application/json,%5B" + ",".join(json.dumps(row) for row in ROWS).replace("%", "%25") + "%5D",
    ],
)
def test_data_uris(uri: str) -> None:
    dataset = read_dataset(uri)
    assert [row.value for row in dataset.rows] == ROWS
    assert dataset.source == uri.partition(",")[0]


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read_dataset(str(tmp_path / "gone.jsonl"))
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_dataset(str(folder))
