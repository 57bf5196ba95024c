"""Waiting for a condition, never for a time."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 300.0) -> T:
    """Ask until it holds, and return what it returned.

    :param seconds: after which the test fails: more than a slow machine takes.
    """
    deadline = monotonic() + seconds
    while not (found := condition()):
        assert monotonic() < deadline, f"did not hold in {seconds:g} s"
        sleep(0.05)
    return found
