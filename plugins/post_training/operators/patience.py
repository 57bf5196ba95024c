"""MLflow and Ray are waited for: a task that has worked for hours does not fail because one is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from post_training.errors import (
    ClusterRefusesError,
    ClusterUnavailableError,
    PostTrainingError,
    RecordUnavailableError,
)

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

PATIENCE_SECONDS = 600.0
"""How long a task waits for MLflow before its attempt fails, or at its end before the record is left open."""

PAUSE_SECONDS = 5.0


def record_is_away(error: PostTrainingError) -> bool:
    """Whether MLflow did not answer."""
    return isinstance(error, RecordUnavailableError)


def cluster_is_away(error: PostTrainingError) -> bool:
    """Whether the Ray cluster did not answer, and may do so later."""
    return isinstance(error, ClusterUnavailableError) and not isinstance(error, ClusterRefusesError)


def persist(
    call: Callable[[], _T],
    give_up: Callable[[], bool] = lambda: False,
    patience: float = PATIENCE_SECONDS,
    is_away: Callable[[PostTrainingError], bool] = record_is_away,
) -> _T:
    """Call until whoever is called answers, MLflow unless another is named, or the time is over.

    :param give_up: asked between two calls.
    :param patience: seconds.
    :param is_away: whether an error says that it did not answer; others are raised at once.
    :raises PostTrainingError: the last of these errors, if it does not.
    """
    deadline = monotonic() + patience
    while True:
        try:
            return call()
        except PostTrainingError as unavailable:
            if not is_away(unavailable) or give_up() or monotonic() + PAUSE_SECONDS > deadline:
                raise
            logger.warning("%s; asking again in %g s", unavailable, PAUSE_SECONDS)
            time.sleep(PAUSE_SECONDS)
