"""Questions and answers about Python's standard library, made from its docstrings.

Real text that is on every machine: no download, the same rows for one Python version.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "cmath", "collections", "contextlib", "copy", "csv",
    "datetime", "decimal", "difflib", "dis", "email.utils", "enum", "fileinput", "fnmatch", "fractions",
    "functools", "glob", "gzip", "hashlib", "heapq", "hmac", "html", "inspect", "io", "ipaddress",
    "itertools", "json", "linecache", "locale", "logging", "math", "mimetypes", "operator", "os", "os.path",
    "pathlib", "pickle", "pkgutil", "platform", "pprint", "queue", "random", "re", "sched", "secrets",
    "shelve", "shlex", "shutil", "signal", "socket", "statistics", "string", "struct", "subprocess", "sys",
    "tarfile", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback", "types",
    "unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "zipfile", "zlib",
)  # fmt: skip
SHORTEST_ANSWER = 40
LONGEST_ANSWER = 320
"""Characters; longer docstrings are cut at the end of a sentence."""

VALIDATION_SHARE = 8
"""One row in so many is held out."""


def write_questions(folder: Path, *, rows: int = 300) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``validation.jsonl`` and return their paths.

    A name is in one of them by its digest, so no question is in both.

    :param rows: rows over both files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(questions(), key=lambda row: _digest(row["question"]))[:rows]
    held_out = [row for row in ordered if _digest(row["answer"]) % VALIDATION_SHARE == 0]
    train = [row for row in ordered if row not in held_out]
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, part in zip(paths, (train, held_out), strict=True):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
    return paths


def questions() -> Iterator[dict[str, str]]:
    """Yield one row for each public function and class that has a docstring of its own; answers differ."""
    seen: set[str] = set()
    for module_name in MODULES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(module_name)
            members = [(name, getattr(module, name)) for name in public_names(module)]
        for name, value in members:
            answer = answer_of(value)
            if answer is not None and answer not in seen:
                seen.add(answer)
                kind = "class" if inspect.isclass(value) else "function"
                yield {"question": f"What does the Python {kind} {module_name}.{name} do?", "answer": answer}


def public_names(module: Any) -> list[str]:
    """Return the module's public names, sorted."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return sorted(name for name in names if hasattr(module, name))


def answer_of(value: Any) -> str | None:
    """Return the first paragraph of a callable's own docstring in one line, None where it says too little."""
    if not callable(value):
        return None
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    text = inspect.cleandoc(docstring) if isinstance(docstring, str) else ""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    prose = [part for part in paragraphs if not re.match(r"[\w.]+\(.*\)( -+> .*)?$", part)]
    if not prose or not len(prose[0]) >= SHORTEST_ANSWER or ">>>" in prose[0]:
        return None
    answer = prose[0][:LONGEST_ANSWER]
    return answer if len(prose[0]) <= LONGEST_ANSWER else answer.rpartition(". ")[0] + "."


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
