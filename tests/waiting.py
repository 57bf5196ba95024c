"""Waiting for a condition, never for a time; one of them is that a server answers."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import Any, TypeVar

import httpx

from post_training.certificates import certificates

T = TypeVar("T")

PATIENCE = 1500.0
"""Seconds after which what is waited for does not come any more, on a machine that is five times slower."""


def wait_until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Ask until it holds, and return what it returned.

    What takes long to ask, a server's answer, is asked less often: it costs the time of what is waited for.

    :param seconds: after which the test fails.
    """
    deadline = monotonic() + seconds
    asked = monotonic()
    while not (found := condition()):
        now = monotonic()
        assert now < deadline, f"did not hold in {seconds:g} s"
        sleep(min(max(0.05, 5 * (now - asked)), 1.0))
        asked = monotonic()
    return found


def answers(url: str, seconds: float = 5.0, **request: Any) -> bool:
    """Whether a server answers so soon, and not with an error."""
    try:
        return httpx.get(url, timeout=seconds, verify=certificates(), **request).is_success
    except httpx.HTTPError:
        return False
