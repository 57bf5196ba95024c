"""What a hostile caller sends: values, ids and whole bodies; for the tests over fakes and real servers."""

from __future__ import annotations

import gzip
import json
from typing import Any

from hypothesis import strategies as st

from tests.requests_of import changed


def nested(levels: int) -> Any:
    """Return lists within one another."""
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


VALUES: list[Any] = [
    None,
    True,
    "",
    " ",
    "\0",
    "\\u0000",
    "\ud800",
    "'; DROP TABLE dag_run; --",
    "{{ 7 * 7 }}",
    "../../etc/passwd",
    "file:///etc/passwd",
    "https://169.254.169.254/latest.jsonl",
    "data:,x",
    "x" * 5_000,
    -1,
    0,
    1,
    2,
    2**31,
    2**63,
    1e-320,
    1e308,
    [],
    [[[[]]]],
    {},
    {"__proto__": {"a": 1}},
    '{"type": "LoRA", "type": "QAT"}',
]

DATASETS: dict[str, dict[str, Any]] = {
    "deep metadata": {"metadata": {"a": nested(300)}, "source": {"type": "rows", "rows": [{"a": 1}]}},
    "deep rows": {"metadata": {}, "source": {"type": "rows", "rows": [{"a": nested(300)}]}},
}
"""Parts of a registration that can be read and not be shown again."""

JOB_IDS = [
    "%2F",
    "..%2F..%2Fetc%2Fpasswd",
    "%252e%252e",
    "%00",
    "job-1%00",
    "job-1%0A",
    "job%C3%BC",
    "%ED%A0%80",
    "%FF",
    "'%20OR%20'1'%3D'1",
    "%27%29%3B--",
    "x" * 1001,
    "supervised_fine_tune.job-1.train",
    "{job_uuid}",
    "%25s",
]
"""No job's id, percent-encoded as part of a path or of a query."""


def raw_bodies(body: dict[str, Any], depth: int) -> dict[str, tuple[bytes, dict[str, str], str]]:
    """Return bodies that are no request: each with headers, and a part of the sentence that refuses it.

    :param depth: levels of the nested ones.
    """
    text = json.dumps(body)
    said_twice = text.replace('"job_uuid":', '"job_uuid": "other", "job_uuid":', 1)
    inner = json.dumps(json.dumps(body["training_config"]).replace("{", '{"n_epochs": 9, ', 1))
    names = [f'"n{number:04}": 0' for number in range(1_000)]
    cases = {
        "a name twice, late": (
            f"{{{', '.join([*names, names[-1]])}}}".encode(),
            "the name 'n0999' twice",
        ),
        "a name twice": (said_twice.encode(), "the name 'job_uuid' twice"),
        "a name twice inside": (text.replace('"n_epochs"', '"n_epochs": 9, "n_epochs"', 1).encode(), "twice"),
        "a name twice in a text": (
            json.dumps({**body, "training_config": json.loads(inner)}).encode(),
            "the name 'n_epochs' twice",
        ),
        "nested lists": (b"[" * depth + b"]" * depth, "nested too deeply"),
        "nested objects": (b'{"":' * depth + b"1" + b"}" * depth, "nested too deeply"),
        "NaN": (text.replace('"n_epochs": ', '"n_epochs": NaN, "a": ', 1).encode(), "NaN is no JSON"),
        "Infinity": (
            text.replace('"n_epochs": ', '"n_epochs": -Infinity, "a": ', 1).encode(),
            "-Infinity is",
        ),
        "a number of 5,000 digits": (b"1" * 5_000, "no valid JSON"),
        "a number of 400 digits": (
            text.replace('"n_epochs": ', f'"n_epochs": 1{"0" * 400}, "a": ', 1).encode(),
            "less than or equal to 2147483647",
        ),
        "an infinite number": (
            json.dumps(changed(body, training_config__optimizer_config=None))
            .replace(
                "null", '{"optimizer_type": "adamw", "lr": 1e999, "weight_decay": 0, "num_warmup_steps": 0}'
            )
            .encode(),
            "finite number",
        ),
        "half a character": (json.dumps({**body, "\ud800": 1}).encode(), "valid Unicode"),
        "UTF-16": (text.encode("utf-16"), "no UTF-8"),
        "Latin-1": (b'"\xfc"', "no UTF-8"),
        "nothing": (b"", "Field required"),
        "a list": (b"[]", "valid dictionary"),
        "null": (b"null", "Field required"),
        "an end that is missing": (text[:-1].encode(), "no valid JSON"),
        "two": (text.encode() * 2, "no valid JSON"),
    }
    json_type = {"Content-Type": "application/json"}
    return {name: (content, json_type, said) for name, (content, said) in cases.items()} | {
        "a form": (
            b"job_uuid=1",
            {"Content-Type": "application/x-www-form-urlencoded"},
            "got 'application/x-www",
        ),
        "plain text": (text.encode(), {"Content-Type": "text/plain"}, "got 'text/plain'"),
        "no type": (text.encode(), {}, "got 'none'"),
        "gzip": (gzip.compress(text.encode()), json_type | {"Content-Encoding": "gzip"}, "no UTF-8"),
    }


def paths(body: dict[str, Any], prefix: str = "") -> list[str]:
    """Return every field of a body, as ``requests_of.changed`` names it."""
    found: list[str] = []
    for name, value in body.items():
        found.append(prefix + name)
        if isinstance(value, dict):
            found += paths(value, f"{prefix}{name}__")
    return found


def near(body: dict[str, Any], ids: list[str], name: str = "job_uuid") -> st.SearchStrategy[dict[str, Any]]:
    """Return bodies with up to two fields replaced by hostile values, under few ids, so that some meet.

    :param name: the id's field.
    """
    change = st.tuples(st.sampled_from(paths(body)), st.sampled_from([*VALUES, ...]))
    changes = st.lists(change, max_size=2, unique_by=lambda pair: pair[0])
    named = st.sampled_from([{**body, name: value} for value in ids])
    return st.builds(_with, named, changes)


def _with(body: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    result = body
    for path, value in sorted(changes, reverse=True):  # what lies deeper first
        result = changed(result, **{path: value})
    return result
