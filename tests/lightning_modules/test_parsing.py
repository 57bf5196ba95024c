"""What is in files, and what is wrong in them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import Limits
from post_training.errors import DataError


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """The bytes of a parquet file."""
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def packed(rows: int, answer: str) -> bytes:
    """A parquet file that holds one answer once and says how often it is there."""
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"answer": [answer] * rows}), sink, compression="zstd")
    return sink.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_nulls_of_columnar_files_are_left_out_at_every_depth(tmp_path: Path) -> None:
    """Arrow gives every object the keys of all; the nulls that a JSON row has are its own."""
    call = {"name": "add", "arguments": {"a": 1}}
    other = {"name": "neg", "arguments": {"b": [0, None]}}
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}],
            "id": 1,
        },
        {"messages": [{"role": "assistant", "tool_calls": [other]}]},
    ]
    read = read_dataset(str(write(tmp_path / "rows.parquet", parquet_of(rows))))
    assert [row.value for row in read.rows] == rows
    own = [{"messages": [{"role": "user", "name": None}]}]
    read = read_dataset(str(write(tmp_path / "rows.json", json.dumps(own).encode())))
    assert [row.value for row in read.rows] == own


def test_a_broken_line_is_a_bad_row_with_its_line_number(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n\n{"a": \n[1]\n')
    first, second, third = read_dataset(str(path)).rows
    assert (first.number, first.error) == (1, None)
    assert (second.number, third.number) == (3, 4)
    assert second.error is not None
    assert second.error.startswith("not JSON: ")
    assert third.error == "must be an object, got list"


def test_csv_rows_with_too_many_cells_are_bad(tmp_path: Path) -> None:
    rows = read_dataset(str(write(tmp_path / "rows.csv", b"a,b\n1,2,3\n1,\n"))).rows
    assert rows[0].error == "has more cells than the header"
    assert rows[1].value == {"a": "1"}


def test_csv_quotes_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    content = b'a,b\r\n"1,""2""","x\r\ny\nz"\r\n\r\n3,4\r\n'
    rows = read_dataset(str(write(tmp_path / "rows.csv", content))).rows
    assert [row.value for row in rows] == [{"a": '1,"2"', "b": "x\r\ny\nz"}, {"a": "3", "b": "4"}]
    assert [row.number for row in rows] == [1, 2]


def test_a_line_that_no_parser_can_read_is_a_bad_row(tmp_path: Path) -> None:
    content = b'{"a": 1' + b"0" * 5000 + b"}\n" + b"[" * 100_000 + b'\n{"a": 1}'
    number, deep, good = read_dataset(str(write(tmp_path / "rows.jsonl", content))).rows
    assert number.error is not None
    assert number.error.startswith("not JSON: ")
    assert deep.error is not None
    assert deep.error.startswith("not JSON: ")
    assert good.value == {"a": 1}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.jsonl", b"\xff\xfe\x00", "cannot read the data set"),
        ("rows.json", b"3", "must hold a list of objects"),
        ("rows.parquet", b"not parquet", "cannot read the data set"),
        ("rows.parquet", packed(0, ""), "holds no rows"),
        ("rows.txt", b"x", "unknown suffix 'txt'"),
        ("rows.jsonl.gz", b"x", "unknown suffix 'gz'"),
        ("rows.csv", b"a,b,a\n1,2,3\n", "a column's name is there twice: a, b, a"),
        ("rows.csv", b'a,b\n1,2\n"3,4\n5,6\n', "line 4: unexpected end of data"),
        ("rows.csv", b'a,b\n1,2\n"3"3,4\n5,6\n', "line 3: "),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        read_dataset(str(write(tmp_path / name, content)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "limit"),
    [
        (packed(20_000, ""), 19_999),  # a byte a row
        (packed(1_000, "x" * 100), 99_999),
        (packed(1, "x" * 100_000), 99_999),
    ],
)
def test_parquet_that_unpacks_to_more_than_the_limit(tmp_path: Path, content: bytes, limit: int) -> None:
    assert len(content) < 2_000
    uri = "data:application/vnd.apache.parquet;base64," + base64.b64encode(content).decode()
    with pytest.raises(DataError, match=f"is larger than the limit of {limit} bytes"):
        read_dataset(uri, limits=Limits(max_bytes=limit))
    rows = read_dataset(uri, limits=Limits(max_bytes=200_000)).rows
    assert rows[-1].number == len(rows)
    read = read_dataset(str(write(tmp_path / "rows.parquet", content)), limits=Limits(limit))
    assert list(read.rows) == list(rows)
