"""The thread that sends: in order, through outages, and no further once it is superseded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from lightning_modules.sender import Deliver, RefusedError, Sender
from lightning_modules.spool import Event, Spool
from post_training.errors import SupersededError
from tests.waiting import wait_until


class Receiver:
    """Takes events until it is told what to raise."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.error: Exception | None = None
        self.refused: set[int] = set()
        self.asked = 0
        self.seconds = 0.0

    def __call__(self, kind: str, events: Sequence[Event]) -> None:
        self.asked += 1
        sleep(self.seconds)
        if self.error is not None:
            raise self.error
        numbers = [event["number"] for event in events]
        if self.refused & set(numbers):
            raise RefusedError("no")
        self.taken += numbers


def numbered(*numbers: int, kind: str = "tag") -> list[Event]:
    return [{"kind": kind, "number": number} for number in numbers]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "events.jsonl", "run")


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def started(spool: Spool, receiver: Receiver) -> Iterator[Any]:
    """Start a sender to the receiver; it is closed at the end."""
    senders: list[Sender] = []

    def start(deliver: Deliver = receiver) -> Sender:
        senders.append(Sender(spool, deliver, interval=0.02, max_backoff=0.05))
        senders[-1].start()
        return senders[-1]

    yield start
    for sender in senders:
        sender.close(0.1)


def never() -> bool:
    return False


def test_it_is_drained_when_the_last_event_was_taken(spool: Spool, receiver: Receiver, started: Any) -> None:
    spool.append([*numbered(1, 2), *numbered(3, kind="param"), *numbered(4)])
    sender = started()
    assert sender.drained(30.0, never)
    assert receiver.taken == [1, 2, 3, 4]
    assert sender.drained(0.0, never)
    spool.append(numbered(5))
    assert sender.drained(30.0, never)
    assert receiver.taken == [1, 2, 3, 4, 5]


def test_an_outage_is_waited_out_and_said_once(
    spool: Spool, receiver: Receiver, started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lightning_modules")
    receiver.error = ConnectionError("down")
    spool.append(numbered(1, 2))
    sender = started()
    wait_until(lambda: receiver.asked >= 3)
    assert not sender.drained(0.2, never)
    receiver.error = None
    assert sender.drained(30.0, never)
    assert receiver.taken == [1, 2]
    wait_until(lambda: "is being sent again" in caplog.text)  # said after the event has left the spool
    assert caplog.text.count("cannot be sent now") == 1
    assert caplog.text.count("is being sent again") == 1


def test_an_outage_counts_from_when_it_is_waited_for_and_sending_does_not_count(
    spool: Spool, receiver: Receiver, started: Any
) -> None:
    receiver.error = ConnectionError("down")
    spool.append(numbered(1))
    sender = started()
    wait_until(lambda: receiver.asked)
    sleep(0.6)
    asked = receiver.asked
    wait_until(lambda: receiver.asked >= asked + 2)  # an outage that is longer than the patience already
    began = monotonic()
    assert not sender.drained(0.5, never)
    assert monotonic() - began >= 0.5

    receiver.error, receiver.seconds = None, 0.7  # it works again, and takes longer than the patience
    spool.append(numbered(2, kind="param"))
    assert sender.drained(0.5, never)
    assert receiver.taken == [1, 2]


def test_waiting_is_given_up_when_it_is_asked_to_be(spool: Spool, receiver: Receiver, started: Any) -> None:
    receiver.error = ConnectionError("down")
    spool.append(numbered(1))
    sender = started()
    answers = iter([False, False, True])
    assert not sender.drained(60.0, lambda: next(answers))
    assert next(answers, None) is None


def test_a_superseded_sender_ends_and_keeps_nobody_waiting(
    spool: Spool, receiver: Receiver, started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.error = SupersededError("A newer attempt at this job runs.")
    spool.append(numbered(1))
    sender = started()
    assert not sender.drained(60.0, never)
    receiver.error = None
    spool.append(numbered(2))
    assert not sender.close(30.0)
    assert (receiver.taken, receiver.asked) == ([], 1)
    assert "Nothing more is recorded" in caplog.text


def test_a_sender_that_has_nothing_to_send_watches_and_ends_when_it_is_superseded(
    spool: Spool, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[Exception] = iter([ConnectionError("down"), SupersededError("A newer attempt runs.")])

    def watch() -> None:
        raise next(answers)

    sender = Sender(spool, receiver, watch=watch, interval=0.02)
    sender.start()
    wait_until(lambda: "Nothing more is recorded" in caplog.text)
    assert "cannot be sent now" not in caplog.text
    spool.append(numbered(1))
    assert not sender.close(30.0)
    assert receiver.taken == []


def test_what_is_refused_is_left_out_alone(
    spool: Spool, receiver: Receiver, started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.refused = {2}
    spool.append(numbered(1, 2, 3))
    assert started().drained(30.0, never)
    assert receiver.taken == [1, 3]
    assert caplog.text.count("refused this tag for good: no") == 1


def test_closing_sends_the_rest_within_its_time(spool: Spool, receiver: Receiver, started: Any) -> None:
    sender = started()
    spool.append(numbered(1, 2))
    assert sender.close(30.0)
    assert receiver.taken == [1, 2]
    receiver.error = ConnectionError("down")
    spool.append(numbered(3))
    late = started()
    began = monotonic()
    assert not late.close(0.3)
    assert 0.3 <= monotonic() - began < 10.0
    assert [spooled.event["number"] for spooled in spool.pending(5)] == [3]
