"""Waiting for a condition, never for a time."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 300.0) -> T:
    """Ask until it holds, and return what it returned.

    What takes long to ask, a server's answer, is asked less often: it costs the time of what is waited for.

    :param seconds: after which the test fails: more than a slow machine takes.
    """
    deadline = monotonic() + seconds
    asked = monotonic()
    while not (found := condition()):
        now = monotonic()
        assert now < deadline, f"did not hold in {seconds:g} s"
        sleep(min(max(0.05, 5 * (now - asked)), 1.0))
        asked = monotonic()
    return found
