"""A job's record on disk, ahead of MLflow: one file of lines, one cursor that says how far they were sent."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]
"""One thing to record. ``kind`` is metrics, param, tag, untag or dataset; in the spool of tables table or
figure; in that of uploads checkpoint, discard or state."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class SpooledEvent:
    """An event that waits, and the byte offset in the file at which it ends."""

    event: Event
    end: int


class Spool:
    """Append-only JSON lines, shared by all attempts of a job and read by one sender.

    The file is the queue: an outage of any length costs disk, not memory, and a killed
    process loses nothing that was appended.

    :param file: the lines; the cursor lies beside it.
    :param run_id: MLflow run the lines go to. A cursor of another run counts as none.
    """

    def __init__(self, file: Path, run_id: str | None) -> None:
        self._file = file
        self._cursor_file = file.with_name(f"{file.stem}.cursor.json")
        self._run_id = run_id
        self._lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self._sent = self._read_cursor()

    @property
    def folder(self) -> Path:
        """The folder that the file is in."""
        return self._file.parent

    @property
    def size(self) -> int:
        """Bytes of all events so far."""
        return self._file.stat().st_size if self._file.exists() else 0

    @property
    def sent(self) -> int:
        """Bytes of the events that were sent."""
        return self._sent

    def append(self, events: Iterable[Event]) -> None:
        """Write the events behind the others.

        :raises OSError: when the disk refuses; the record must not lose points in silence.
        """
        lines = "".join(f"{json.dumps(event, separators=(',', ':'))}\n" for event in events).encode()
        with self._lock, self._file.open("ab", buffering=0) as out:
            before = out.tell()
            written = out.write(lines)
            if written < len(lines):  # as much as a full disk had room for
                out.truncate(before)
                raise OSError(errno.ENOSPC, "the disk has no room for the record", str(self._file))

    def pending(self, limit: int) -> list[SpooledEvent]:
        """List up to ``limit`` events that were not sent yet, oldest first."""
        if not self._file.exists():
            return []
        found: list[SpooledEvent] = []
        with self._file.open("rb") as lines:
            end = lines.seek(self._sent)
            for line in lines:
                if len(found) == limit or not line.endswith(b"\n"):
                    break
                end += len(line)
                found.append(SpooledEvent(json.loads(line), end))
        return found

    def advance(self, end: int) -> None:
        """Remember that everything before this offset was sent, by rename."""
        self._sent = end
        draft = self._cursor_file.with_suffix(".tmp")
        draft.write_text(json.dumps({"run_id": self._run_id, "sent_bytes": end}))
        draft.replace(self._cursor_file)

    def last_steps(self) -> dict[str, int]:
        """The last step of each metric in the file, sent or not."""
        last: dict[str, int] = {}
        for event in self.events():
            if event["kind"] == "metrics":
                for key in event["values"]:
                    last[key] = max(event["step"], last.get(key, event["step"]))
        return last

    def last_tag(self, key: str) -> str | None:
        """The last value of a tag in the file, sent or not; None where it was never set."""
        found = None
        for event in self.events():
            if event["kind"] == "tag" and event["key"] == key:
                found = str(event["value"])
        return found

    def point_at(self, key: str, step: int) -> tuple[float, int] | None:
        """A metric's finite value at a step, and when it was spooled in milliseconds; None if it was not."""
        found = None
        for event in self.events():
            if event["kind"] == "metrics" and event["step"] == step:
                value = event["values"].get(key)
                found = (float(value), int(event["time"])) if value is not None else found
        return found

    def points(self, key: str) -> dict[int, float]:
        """A metric's finite values by step."""
        return {
            event["step"]: value
            for event in self.events()
            if event["kind"] == "metrics" and (value := event["values"].get(key)) is not None
        }

    def events(self) -> Iterator[Event]:
        """Yield all events, sent or not, oldest first."""
        if self._file.exists():
            with self._file.open("rb") as lines:
                yield from (json.loads(line) for line in lines)

    def _read_cursor(self) -> int:
        try:
            cursor = json.loads(self._cursor_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return 0
        fits = cursor["run_id"] == self._run_id and cursor["sent_bytes"] <= self.size
        return int(cursor["sent_bytes"]) if fits else 0

    def _cut_torn_line(self) -> None:
        """A machine that went down in mid-write leaves half a line; the next would be glued to it."""
        if not self._file.exists():
            return
        with self._file.open("r+b") as lines:
            end = size = lines.seek(0, 2)
            while end > 0:
                start = max(0, end - _BLOCK_BYTES)
                lines.seek(start)
                newline = lines.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                lines.truncate(end)
