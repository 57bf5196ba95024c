"""Processes that end with the one that started them: prctl(2), of Linux alone."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec a child may call it, but not load it.
_prctl = ctypes.CDLL(None, use_errno=True).prctl


def bind_to_parent(number: signal.Signals) -> None:
    """Let this process get a signal when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def die_with(parent: int) -> Callable[[], None]:
    """Return what the child runs before exec: be killed when the parent's thread ends, also if it has."""

    def bind() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return bind
