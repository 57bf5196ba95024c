"""Data sets of a hub that runs here."""

from __future__ import annotations

import hashlib
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

import pytest

from lightning_modules.data.reading import read_dataset
from post_training.errors import DataError

ROWS = [{"question": "a, b?", "answer": "1"}, {"question": 'say "é"', "answer": "2\n3"}]


JSONL = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n"


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
