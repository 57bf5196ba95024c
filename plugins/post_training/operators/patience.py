"""MLflow is waited for: a task that has worked for hours does not fail because the record is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from post_training.errors import RecordUnavailableError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

PATIENCE_SECONDS = 600.0
"""How long a task waits for MLflow before its attempt fails, or at its end before the record is left open."""

PAUSE_SECONDS = 5.0


def persist(
    call: Callable[[], _T], give_up: Callable[[], bool] = lambda: False, patience: float = PATIENCE_SECONDS
) -> _T:
    """Call until MLflow answers or the time is over.

    :param give_up: asked between two calls.
    :param patience: seconds.
    :raises RecordUnavailableError: if it does not.
    """
    deadline = monotonic() + patience
    while True:
        try:
            return call()
        except RecordUnavailableError as unavailable:
            if give_up() or monotonic() + PAUSE_SECONDS > deadline:
                raise
            logger.warning("%s; asking again in %g s", unavailable, PAUSE_SECONDS)
            time.sleep(PAUSE_SECONDS)
