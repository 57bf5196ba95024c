"""What all attempts at a job used of devices."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Used:
    """Sums over a job's attempts; see :class:`lightning_modules.callbacks.Resources`.

    :param device_seconds: seconds times devices.
    :param job_tokens: tokens that went through an optimizer step, as often as they did.
    """

    device_seconds: float = 0.0
    job_tokens: int = 0

    def plus(self, device_seconds: float, tokens: int) -> Used:
        """Return the sum, to the millisecond."""
        return Used(round(self.device_seconds + device_seconds, 3), self.job_tokens + tokens)


def most_used(texts: Iterable[str]) -> Used:
    """Return the largest of what attempts told, which only ever grows: two machines may know two of them.

    :param texts: JSON objects; one without these figures tells of nothing.
    """
    told = [json.loads(text) for text in texts]
    found = [Used(one["device_seconds"], one["job_tokens"]) for one in told if "device_seconds" in one]
    return max(found, key=lambda used: used.device_seconds, default=Used())
