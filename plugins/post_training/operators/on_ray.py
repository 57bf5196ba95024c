"""One attempt's job on the deployment's Ray cluster: found again or submitted, waited for, and read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from post_training.errors import ClusterUnavailableError, InvalidRequestError, TrainerError
from post_training.launch.ray_jobs import RayJob, RayJobs, result_in, without_result
from post_training.operators.patience import cluster_is_away, persist
from post_training.operators.task_record import TaskRecord
from post_training.schemas.record import TAG_FOLLOWED, TAG_SUPERSEDES
from post_training.schemas.trainer import TrainerResult, TrainerSpec
from post_training.settings import load_settings
from post_training.tracking import JobRun, Tracking

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def ray_jobs() -> RayJobs:
    """Return the jobs of the deployment's cluster.

    :raises InvalidRequestError: if it has none.
    """
    settings = load_settings()
    if settings.ray_address is None:
        raise InvalidRequestError.of(
            "runtime.launcher",
            "must be local: the deployment has no Ray cluster, its ray_address is empty; got 'ray'",
        )
    return RayJobs(settings.ray_address, settings.ray_token)


def check_states_are_kept() -> None:
    """Refuse to train on Ray where a state would be lost with its node.

    :raises InvalidRequestError: if the deployment keeps no states in MLflow.
    """
    if not load_settings().keep_state_in_mlflow:
        raise InvalidRequestError.of(
            "runtime.launcher",
            "must be local: the deployment's keep_state_in_mlflow is False, and nodes of a Ray cluster share"
            " no disk, so a job that lost one would begin at step 0; got 'ray'",
        )


def submission_of(run_id: str, attempt_id: str) -> str:
    """Return the id of an attempt's job on the cluster: who submits it twice finds it the second time."""
    return f"post-training-{run_id}-{attempt_id}"


@dataclass(frozen=True)
class Ended:
    """A job on the cluster that has ended.

    :param attempt_id: of the attempt that submitted it.
    """

    job: RayJob
    submission_id: str
    attempt_id: str


@dataclass(frozen=True)
class OnRay:
    """What an attempt does with the cluster. Its task may end between any two calls: each looks anew.

    :param run: the job's run, as it was when the attempt began or went on.
    :param patience: seconds for which a cluster is waited for that does not answer.
    """

    jobs: RayJobs
    tracking: Tracking
    record: TaskRecord
    run: JobRun
    patience: float

    def _ask(self, call: Callable[[], _T]) -> _T:
        """Call until the cluster answers, the time is over or the task is stopped.

        :raises ClusterUnavailableError: if it does not.
        """
        return persist(call, self.record.give_up, self.patience, cluster_is_away)

    def find(self) -> Ended | str | None:
        """Return the job that the attempt follows: that has ended, or the id of one that runs; None has none.

        A job of an attempt before is followed, whose worker was lost; but not if it failed by then.

        :raises ClusterUnavailableError: if the cluster does not answer.
        """
        attempt_id = self.run.tags.get(TAG_FOLLOWED)
        if not attempt_id:
            return None
        submission_id = submission_of(self.run.run_id, attempt_id)
        job = self._ask(lambda: self.jobs.find(submission_id))
        if job is None:
            return None
        if not job.ended:
            return submission_id
        is_own = attempt_id == self.record.attempt_id
        return Ended(job, submission_id, attempt_id) if is_own or job.status == "SUCCEEDED" else None

    def submit(self, spec: TrainerSpec) -> str:
        """Start the attempt's own job, and return its id.

        :raises ClusterUnavailableError: if the cluster does not answer, or refuses it.
        :raises RecordUnavailableError: if MLflow does not answer in time.
        """
        submission_id = submission_of(self.run.run_id, self.record.attempt_id)
        if self.run.tags.get(TAG_FOLLOWED) == self.record.attempt_id:
            logger.warning(
                "the cluster does not know job %s any more, as where its head was lost:"
                " it is submitted again, and its log until now is gone",
                submission_id,
            )
        self.record.persist(self._begin)
        body, credentials = spec.model_dump_json(), self.tracking.server.environment()
        self._ask(lambda: self.jobs.submit(submission_id, body, credentials))
        logger.info("job on Ray: %s", submission_id)
        return submission_id

    def _begin(self) -> None:
        """Say whose job trains in the run, before there is one; stop that of a run which this supersedes."""
        self.tracking.set_tags(self.run.run_id, {TAG_FOLLOWED: self.record.attempt_id})
        superseded = self.tracking.get(self.run.tags.get(TAG_SUPERSEDES, ""))
        if superseded is not None and superseded.tags.get(TAG_FOLLOWED):
            before = submission_of(superseded.run_id, superseded.tags[TAG_FOLLOWED])
            self._ask(lambda: self.jobs.stop(before))

    def read(self, ended: Ended, log_file: Path, keep: Callable[[Path], None]) -> TrainerResult:
        """Return the result of a job that has ended.

        :param log_file: receives its output, and is then given to ``keep``.
        :raises TrainerError: if it left none.
        :raises ClusterUnavailableError: if the cluster does not answer.
        """
        log = self._ask(lambda: self.jobs.log(ended.submission_id))
        shown = filter(without_result, log.splitlines(keepends=True))
        log_file.write_text("".join(shown), encoding="utf-8")
        keep(log_file)
        return result_in(log, ended.job, ended.attempt_id)

    def leave(self, why: str, log_file: Path, keep: Callable[[Path], None]) -> TrainerResult:
        """Leave a job that was stopped, so that no attempt follows it; return its result if it was faster.

        :param why: it was stopped.
        :raises TrainerError: with that reason, if it left no result.
        :raises RecordUnavailableError: if MLflow does not answer in time.
        """
        with suppress(ClusterUnavailableError, TrainerError):
            found = self.find()
            if isinstance(found, Ended):
                return self.read(found, log_file, keep)
        self.record.persist(lambda: self.tracking.set_tags(self.run.run_id, {TAG_FOLLOWED: ""}))
        raise TrainerError(why)
