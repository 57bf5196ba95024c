"""The thread that carries a spool to wherever it is delivered, and outlives outages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from time import monotonic

from lightning_modules.spool import Event, Spool, SpooledEvent
from post_training.errors import SupersededError

_log = logging.getLogger(__name__)

EVENTS_PER_ROUND = 500
_POLL_SECONDS = 0.1

Deliver = Callable[[str, Sequence[Event]], None]
"""Sends events of one kind, or raises: RefusedError for good, SupersededError to end the sending, anything
else to be asked again."""


class RefusedError(Exception):
    """The receiver answered that it will never take these events."""


class Sender:
    """Sends what the spool holds, unless a newer attempt does, about every ``interval`` seconds, in order.

    Delivery may be repeated: an answer that was lost is asked for again, so ``deliver``
    must not double what it has already delivered.

    :param watch: called about every ``interval`` seconds while nothing waits; raises SupersededError to end
        the sending. What else it raises is passed over.
    :param interval: seconds between rounds.
    :param max_backoff: longest pause in seconds between tries during an outage.
    """

    def __init__(
        self,
        spool: Spool,
        deliver: Deliver,
        *,
        watch: Callable[[], None] = lambda: None,
        interval: float = 1.0,
        max_backoff: float = 30.0,
    ) -> None:
        self._spool = spool
        self._deliver = deliver
        self._watch = watch
        self._interval = interval
        self._max_backoff = max_backoff
        self._failures = 0
        self._outage: tuple[float, float] | None = None  # its first failure and its last
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="record-sender", daemon=True)

    def start(self) -> None:
        """Start the thread; it is a daemon and never holds up the interpreter's end."""
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Send the rest and stop, within ``timeout`` seconds; say whether everything was sent."""
        self._closing.set()
        deadline = monotonic() + timeout
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - monotonic()))
        self._abandoned.set()
        return not self._spool.pending(limit=1)

    def drained(self, patience: float, give_up: Callable[[], bool]) -> bool:
        """Wait until everything was sent; say whether it was.

        :param patience: seconds of an outage that are waited out, from one failure to a later one; sending
            itself takes as long as it takes.
        :param give_up: asked while waiting.
        """
        began = monotonic()
        while self._spool.pending(limit=1):
            outage = self._outage
            late = outage is not None and outage[1] - max(began, outage[0]) > patience
            if late or give_up() or not self._thread.is_alive():
                return False
            self._abandoned.wait(_POLL_SECONDS)
        return True

    def _run(self) -> None:
        while not self._abandoned.is_set():
            closing = self._closing.is_set()  # read before the round: what comes later is not in it
            empty = self._round()
            if closing and empty:
                return
            if not self._closing.is_set():
                self._closing.wait(min(self._max_backoff, self._interval * 2 ** min(self._failures, 16)))
            elif not empty:
                self._abandoned.wait(self._interval)

    def _round(self) -> bool:
        """Send all that waits; return False if an outage stopped it."""
        try:
            while waiting := self._spool.pending(EVENTS_PER_ROUND):
                for kind, group in groupby(waiting, key=lambda spooled: str(spooled.event["kind"])):
                    self._send(kind, list(group))
            self._look()
        except SupersededError as error:
            _log.warning("%s Nothing more is recorded.", error)
            self._abandoned.set()
            return False
        except Exception as error:  # whatever fails here must not end the thread
            if self._outage is None:
                _log.warning("The record cannot be sent now and is kept on disk: %s", error)
            self._outage = (self._outage[0] if self._outage else monotonic(), monotonic())
            self._failures += 1
            return False
        return True

    def _look(self) -> None:
        """Watch while nothing waits; whoever closes need not wait for that."""
        if self._closing.is_set():
            return
        try:
            self._watch()
        except SupersededError:
            raise
        except Exception as error:  # nothing is known then, and nothing is held up
            _log.debug("the record cannot be watched now: %s", error)

    def _send(self, kind: str, group: list[SpooledEvent]) -> None:
        """Deliver the group, or one by one what of it is not refused."""
        if self._abandoned.is_set():
            raise TimeoutError("given up")
        try:
            self._deliver(kind, [spooled.event for spooled in group])
        except RefusedError as refusal:
            if len(group) > 1:
                for spooled in group:
                    self._send(kind, [spooled])
                return
            _log.warning("The record refused this %s for good: %s", kind, refusal)
        self._spool.advance(group[-1].end)
        if self._outage is not None:
            _log.info("The record is being sent again")
        self._outage, self._failures = None, 0
