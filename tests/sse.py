"""Reads server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Event = tuple[str, str, Any]
"""The event's name, its id, its data read as JSON; of a comment the text alone."""


def events(lines: Iterator[str]) -> Iterator[Event]:
    """Yield the events of a stream, and its comments."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line:
            fields[name] = value
        elif "" in fields:
            yield "", "", fields.pop("")
        elif fields:
            yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
            fields = {}


def lines_of(found: list[Event]) -> list[str]:
    """Return the log lines of these events."""
    return [line for event, _, data in found if event == "log" for line in data["log_lines"]]
