"""Whether this attempt is still wanted: one that was cancelled or replaced stops writing and ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from mlflow import MlflowClient

from lightning_modules.record import limit_http
from post_training.errors import SupersededError
from post_training.schemas.record import TAG_ATTEMPT_ID, TAG_CANCELLED_ATTEMPT, TAG_FOLLOWED
from post_training.schemas.trainer import TrainerSpec

_log = logging.getLogger(__name__)

CHECK_SECONDS = 3.0
"""Time between two looks at the run while it is written to all the time."""


class RunFence:
    """Looks into the MLflow run for the id of the newest attempt; shared by all that write to the run.

    :param attempt_id: this attempt's; empty is never superseded.
    :param on_ray: whether it is a job of a Ray cluster, which trains as long as an attempt follows it.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        attempt_id: str,
        clock: Callable[[], float] = monotonic,
        *,
        on_ray: bool = False,
    ) -> None:
        self._on_ray = on_ray
        self._client = client
        self._run_id = run_id
        self._attempt_id = attempt_id
        self._clock = clock
        self._looked_at: float | None = None
        self.superseded = False

    def check(self, *, now: bool = False) -> None:
        """Look, unless that was done a moment ago.

        A newer attempt may follow this one's trainer, where that is a job of a Ray cluster.
        A run that an older attempt has claimed last is claimed back.

        :param now: look in any case, before something is written that readers rely on.
        :raises SupersededError: if a newer attempt has taken over, or this one was cancelled.
        :raises Exception: whatever MLflow's client raises; nothing is known then.
        """
        if not self._attempt_id:
            return
        recent = self._looked_at is not None and self._clock() - self._looked_at < CHECK_SECONDS
        if not self.superseded and (now or not recent):
            tags = self._client.get_run(self._run_id).data.tags
            self._looked_at = self._clock()
            newest = tags.get(TAG_ATTEMPT_ID, "")
            cancelled = tags.get(TAG_CANCELLED_ATTEMPT, "") >= self._attempt_id  # or a later one was
            followed = tags.get(TAG_FOLLOWED) == self._attempt_id
            self.superseded = cancelled or (not followed and (self._on_ray or newest > self._attempt_id))
            if newest < self._attempt_id:  # an older attempt's slow claim came after this one's
                self._client.set_tag(self._run_id, TAG_ATTEMPT_ID, self._attempt_id)
        if self.superseded:
            raise SupersededError("This attempt was cancelled, or a newer one runs.")


def watch_of(spec: TrainerSpec) -> Callable[[], None]:
    """Return what asks the run whether an attempt is still wanted, for a process that does not record.

    It raises SupersededError where nobody wants it, and nothing else: MLflow's silence holds up nobody.
    """
    if spec.tracking is None:
        return lambda: None
    limit_http()
    client = MlflowClient(tracking_uri=spec.tracking.tracking_uri)
    fence = RunFence(client, spec.tracking.run_id, spec.attempt_id, on_ray=spec.request.on_ray)

    def check() -> None:
        try:
            fence.check(now=True)
        except SupersededError:
            raise
        except Exception as error:
            _log.warning("MLflow does not say whether the job is still wanted: %s", error)

    return check
