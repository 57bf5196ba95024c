"""Every kind of file and address, with one digest for one content."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pyarrow
import pytest
from pyarrow import parquet

from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import Limits
from post_training.errors import DataError

ROWS = [{"question": "a, b?", "answer": "1"}, {"question": 'say "é"', "answer": "2\n3"}]
JSONL = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n"
CSV = b'question,answer\n"a, b?",1\n"say ""\xc3\xa9""","2\n3"\n'


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


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read_dataset(str(tmp_path / "gone.jsonl"))
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_dataset(str(folder))


HUB_FILES = {
    "README.md": b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: rows.jsonl}
  - {split: test, path: more.jsonl}
- config_name: other
  data_files: other.jsonl
- config_name: broken
  data_files: broken.jsonl
- config_name: large
  data_files: [large-0.jsonl, large-1.jsonl]
---
""",
    "rows.jsonl": JSONL,
    "more.jsonl": JSONL * 2,
    "other.jsonl": b'{"question": "alone"}\n{"answer": "as well"}\n',
    "broken.jsonl": b'{"question": ',
    "large-0.jsonl": JSONL + b" " * (600 - len(JSONL)),
    "large-1.jsonl": JSONL + b" " * (401 - len(JSONL)),
}
COMMIT = "0" * 40
CARDS = {
    ("url", "README.md"): "---\nconfigs: [{config_name: a, data_files: HUB/private.jsonl}]\n---\n",
    (
        "other",
        "README.md",
    ): "---\nconfigs: [{config_name: a, data_files: {train: [x.jsonl, HUB/private.jsonl]}}]\n---\n",
    ("chain", "README.md"): "---\nconfigs: [{config_name: a, data_files: 'a_b::HUB/private.jsonl'}]\n---\n",
    ("zip", "README.md"): "---\nconfigs: [{config_name: a, data_files: 'zip://x::HUB/private.zip'}]\n---\n",
    (
        "path",
        "README.md",
    ): "---\nconfigs: [{config_name: a, data_files: [{split: a, path: /etc/x.csv}]}]\n---\n",
    ("folder", "README.md"): "---\nconfigs: [{config_name: a, data_dir: /etc}]\n---\n",
    ("yaml", ".huggingface.yaml"): "---\nconfigs: [{config_name: a, data_files: HUB/private.jsonl}]\n",
}
"""Cards of data sets that are outside the hub, which is HUB, by data set and file."""


class Hub(BaseHTTPRequestHandler):
    """What the datasets library asks of a hub that has one data set, org/name."""

    private: ClassVar[list[str]] = []
    """What was asked for that is no hub's."""
    revisions: ClassVar[set[str]] = set()
    """Of which files were asked for."""

    def do_HEAD(self) -> None:
        path = urlsplit(self.path).path
        name = path.rpartition("/")[2]
        self.private.extend([path] if path.startswith("/private") else [])
        self.revisions.update(re.findall("/resolve/([^/]+)/", path))
        if path.startswith("/datasets/cards/") and (card := CARDS.get((path.split("/")[3], name))):
            host, port = self.server.server_address[:2]
            body = card.replace("HUB", f"http://{host!s}:{port}").encode()
            self._answer(body, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/datasets/org/name/resolve/") and name in HUB_FILES:
            self._answer(HUB_FILES[name], {"ETag": f'"{_git_id(name)}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/datasets/org/name/tree/"):
            self._answer(json.dumps([_hub_entry(file) for file in HUB_FILES]).encode())
        elif path == "/api/datasets/org/gated":
            self._answer(json.dumps({"id": "org/gated", "sha": COMMIT}).encode())
        elif path.startswith("/datasets/org/gated/"):
            self._answer(b"", {"X-Error-Code": "GatedRepo", "X-Repo-Commit": COMMIT}, status=403)
        elif path.startswith("/api/datasets/cards/") and path.count("/") == 4:
            self._answer(json.dumps({"id": path[len("/api/datasets/") :], "sha": COMMIT}).encode())
        elif path == "/api/datasets/org/name" or path.startswith("/api/datasets/org/name/revision/"):
            files = [{"rfilename": file} for file in HUB_FILES]
            self._answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode())
        else:
            code = "RepoNotFound" if "/org/gone" in path else "EntryNotFound"
            self._answer(b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, status=404)

    do_GET = do_HEAD

    def _answer(self, body: bytes, headers: Mapping[str, str] = {}, status: int = 200) -> None:
        self.send_response(status)
        for header in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def _git_id(name: str) -> str:
    body = HUB_FILES[name]
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _hub_entry(name: str) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(HUB_FILES[name]), "oid": _git_id(name)}


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of the hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


READ_ALL = """
import json, sys
from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import Limits
from post_training.errors import DataError
limits = Limits(max_bytes=int(sys.argv[1]))
for source in sys.argv[2:]:
    try:
        dataset = read_dataset("huggingface://datasets/" + source, limits=limits)
        print(json.dumps([dataset.digest, [row.value for row in dataset.rows]]))
    except DataError as error:
        print(json.dumps([str(error), "later"] if isinstance(error.__cause__, OSError) else str(error)))
"""


def read_all(hub: str, folder: Path, *names: str) -> list[Any]:
    """In a new process: the library reads the hub's address and its folders' when it is imported."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", READ_ALL, "1000", *names]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_data_outside_the_hub_are_not_asked_for(hub: str, tmp_path: Path) -> None:
    Hub.private.clear()
    names = [f"cards/{name}" for name, _ in CARDS]
    for sentence in read_all(hub, tmp_path, *names):
        assert sentence.endswith("has a card that names data outside the hub")
    assert Hub.private == []


def test_a_hub_that_does_not_answer_may_do_so_later(hub: str, tmp_path: Path) -> None:
    nobody = hub.rpartition(":")[0] + ":9"
    (answer,) = read_all(nobody, tmp_path, "org/name")
    assert answer[1:] == ["later"]
    assert "cannot read the data set huggingface://datasets/org/name: " in answer[0]


def test_hub_data_sets(hub: str, tmp_path: Path) -> None:
    Hub.revisions.clear()
    shadow = tmp_path / "org" / "name"  # which the library would prefer to the hub's data set
    shadow.mkdir(parents=True)
    (shadow / "train.jsonl").write_text('{"question": "of the working folder"}')
    read = ["", "?split=test", "?split=train[1:]&name=default", "?name=other"]
    refused = {
        "?name=large": "is larger than the limit of 1000 bytes",
        "?split=none": "Unknown split 'none'",
        "?name=none": "'none' not found",
        "?name=broken": "JSON",
    }
    absent = dict.fromkeys(("org/gone", "org/gated"), "is not on the hub, or may not be read")
    addresses = [*(f"org/name{query}" for query in (*read, *refused)), *absent]
    answers = read_all(hub, tmp_path, *addresses)
    digests, rows = zip(*answers[: len(read)], strict=True)
    assert rows == (ROWS, ROWS * 2, ROWS[1:], [{"question": "alone"}, {"answer": "as well"}])
    assert len(set(digests)) == 4
    assert Hub.revisions == {COMMIT}, "what the cards, of which there are none, and the files are read at"
    assert digests[0] == hashlib.sha256(json.dumps(ROWS, sort_keys=True).encode()).hexdigest()
    for sentence, reason in zip(answers[len(read) :], [*refused.values(), *absent.values()], strict=True):
        assert "the data set huggingface://datasets/org/" in sentence
        assert reason in sentence.replace('"', "'")


@pytest.mark.parametrize(
    "address",
    [
        "huggingface://datasets/json",  # the library's own reader of the working folder
        "huggingface://datasets/buckets/org/name",
        "huggingface://models/org/name",
        "huggingface://datasets/org/name?split=train&revision=main",
        "huggingface://datasets/org/name?split=train&split=test",
        "huggingface://datasets/org/name?data_files=",
    ],
)
def test_other_hub_addresses_are_refused(address: str) -> None:
    with pytest.raises(DataError, match=r"must have the form huggingface://datasets/ORG/NAME\?split="):
        read_dataset(address)


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
