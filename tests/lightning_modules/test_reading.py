"""Every kind of file and address, with one digest for one content."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lightning_modules.data.reading import read_dataset
from post_training.errors import DataError

ROWS = [{"question": "a, b?", "answer": "1"}, {"question": 'say "é"', "answer": "2\n3"}]
JSONL = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n"
CSV = b'question,answer\n"a, b?",1\n"say ""\xc3\xa9""","2\n3"\n'


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
        ("rows.csv", CSV),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    for source in (str(path), path.as_uri()):
        dataset = read_dataset(source)
        assert [row.value for row in dataset.rows] == ROWS
        assert dataset.digest == hashlib.sha256(content).hexdigest()


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": "x"}]}]), path)
    assert read_dataset(str(path)).rows[0].value == {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    "uri",
    [
        "data:application/jsonl;base64," + base64.b64encode(JSONL).decode(),
        "data:text/csv;base64," + base64.b64encode(CSV).decode(),
        "data:csv;base64," + base64.b64encode(CSV).decode(),
        "data:application/json,%5B" + ",".join(json.dumps(row) for row in ROWS).replace("%", "%25") + "%5D",
    ],
)
def test_data_uris(uri: str) -> None:
    dataset = read_dataset(uri)
    assert [row.value for row in dataset.rows] == ROWS
    assert "," not in dataset.source


def test_fsspec_schemes() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/d/rows.jsonl", JSONL)
    assert len(read_dataset("memory://d/rows.jsonl").rows) == 2


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


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.jsonl", b"\xff\xfe\x00", "cannot read the data set"),
        ("rows.json", b"3", "must hold a list of objects"),
        ("rows.parquet", b"not parquet", "cannot read the data set"),
        ("rows.txt", b"x", "unknown suffix 'txt'"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        read_dataset(str(write(tmp_path / name, content)))
    assert "\n" not in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read_dataset(str(tmp_path / "gone.jsonl"))
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_dataset(str(folder))
    with pytest.raises(DataError, match=r"cannot read the data set nosuch://host/rows\.jsonl: "):
        read_dataset("nosuch://user:secret@host/rows.jsonl?token=secret")


def test_hub_data_sets_go_through_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # the library takes a folder of the same name for the data set
    (tmp_path / "org" / "name").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "org" / "name" / f"{split}.jsonl").write_bytes(JSONL * (1 if split == "train" else 2))
    train = read_dataset("huggingface://datasets/org/name")
    assert [row.value for row in train.rows] == ROWS
    assert len(train.digest) == 64
    assert len(read_dataset("huggingface://datasets/org/name?split=test").rows) == 4
    with pytest.raises(DataError, match="cannot read the data set huggingface://datasets/org/name"):
        read_dataset("huggingface://datasets/org/name?split=none")
