"""Trainers as jobs of a Ray cluster, through its Jobs API.

Plain HTTP: importing Ray takes many seconds, and nothing here needs more of it. The API:
https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import ValidationError

from post_training.certificates import certificates
from post_training.errors import ClusterRefusesError, ClusterUnavailableError, TrainerError
from post_training.launch.local import TUNING
from post_training.schemas.trainer import RESULT_LINE, SPEC_FILE, TrainerResult

ENTRYPOINT = f"python -m lightning_modules.on_ray {SPEC_FILE}"
TIMEOUT_SECONDS = 60.0
"""For one call. A cluster that has just started takes its time for the first job."""

STOP_SECONDS = 5.0
"""For the call that stops a job: Airflow leaves a trigger that is cancelled 30 s for all of its tries."""

PASSING = frozenset({httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS})
"""Refusals of a client that may be none a moment later."""

_ENVIRONMENT = {
    **TUNING,
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a folder of Ray Train's for results, of which there are none
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the trainer's own lines are the log
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
_ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


@dataclass(frozen=True)
class RayJob:
    """What the cluster knows of a job.

    :param status: in Ray's words.
    :param message: why it is so, empty where Ray does not say.
    """

    status: str
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in _ENDED


class RayJobs:
    """The jobs of a cluster.

    :param address: of its dashboard, the setting ``ray_address``.
    :param token: with which one logs in there; None where nobody needs to.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def submit(self, submission_id: str, spec: str, credentials: Mapping[str, str]) -> None:
        """Start a job, unless it has been started before.

        :param submission_id: by which it is found again.
        :param spec: JSON of a ``TrainerSpec``.
        :param credentials: variables by which its MLflow client logs in.
        :raises ClusterUnavailableError: if the cluster does not answer, or refuses it.
        """
        body = {
            "entrypoint": ENTRYPOINT,
            "submission_id": submission_id,
            "runtime_env": {
                "working_dir": self._upload(spec),
                "env_vars": {**_ENVIRONMENT, **credentials},
            },
        }
        answer = self._call("POST", "/api/jobs/", json=body)
        if not answer.is_success and self.find(submission_id) is None:  # a call before may have arrived
            raise self._refused(answer)

    def find(self, submission_id: str) -> RayJob | None:
        """Return what the cluster knows of a job, None where it knows no such job.

        :raises ClusterUnavailableError: if it does not answer.
        """
        answer = self._call("GET", f"/api/jobs/{submission_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        found = self._read(answer)
        return RayJob(str(found.get("status")), str(found.get("message") or ""))

    def log(self, submission_id: str) -> str:
        """Return the output of a job so far; empty before it has a process.

        :raises ClusterUnavailableError: if the cluster does not answer.
        """
        return str(self._read(self._call("GET", f"/api/jobs/{submission_id}/logs")).get("logs") or "")

    def stop(self, submission_id: str) -> None:
        """Ask a job to end; one that has ended, or is not there, is left alone.

        :raises ClusterUnavailableError: if the cluster does not answer.
        """
        answer = self._call("POST", f"/api/jobs/{submission_id}/stop", timeout=STOP_SECONDS)
        if not answer.is_success and answer.status_code != httpx.codes.NOT_FOUND:
            raise self._refused(answer)

    def _upload(self, spec: str) -> str:
        """Give the cluster the folder that the job starts in, and return its URI there."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(SPEC_FILE, spec)
        name = f"_ray_pkg_{hashlib.sha256(spec.encode()).hexdigest()[:32]}.zip"
        place = f"/api/packages/gcs/{name}"
        if self._call("GET", place).status_code == httpx.codes.NOT_FOUND:
            answer = self._call("PUT", place, content=packed.getvalue())
            if not answer.is_success:
                raise self._refused(answer)
        return f"gcs://{name}"

    def _call(
        self, method: str, path: str, *, timeout: float = TIMEOUT_SECONDS, **content: Any
    ) -> httpx.Response:
        try:
            answer = httpx.request(
                method,
                f"{self._address}{path}",
                headers=self._headers,
                timeout=timeout,
                verify=certificates(),
                **content,
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ClusterRefusesError(self._sentence(f"{type(error).__name__}: {error}")) from None
        except httpx.HTTPError as error:
            raise ClusterUnavailableError(self._sentence(f"{type(error).__name__}: {error}")) from None
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ClusterRefusesError(
                f"[post_training] ray_token must be the token of the Ray cluster at {self._address}, which"
                f" answers {answer.status_code}; its value is not shown"
            )
        return answer

    def _read(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            found = answer.raise_for_status().json()
        except (httpx.HTTPStatusError, ValueError):
            raise self._refused(answer) from None
        if not isinstance(found, dict):
            raise self._refused(answer)
        return found

    def _refused(self, answer: httpx.Response) -> ClusterUnavailableError:
        final = answer.is_client_error and answer.status_code not in PASSING
        lines = answer.text.strip().splitlines()  # of a traceback the last says what is wrong
        why = f"{answer.status_code} {lines[-1][:200] if lines else answer.reason_phrase}"
        return (ClusterRefusesError if final else ClusterUnavailableError)(self._sentence(why))

    def _sentence(self, why: str) -> str:
        return (
            f"[post_training] ray_address must lead to a Ray cluster's Jobs API, got {self._address!r}: {why}"
        )


def result_in(log: str, job: RayJob, attempt_id: str) -> TrainerResult:
    """Return the result that a job has printed; others' output may stand before it in its line.

    :param attempt_id: of the attempt that submitted it.
    :raises TrainerError: if it has printed none: it was stopped, or its driver was lost.
    """
    for line in reversed(log.splitlines()):
        _, found, text = line.partition(RESULT_LINE)
        with suppress(ValidationError):  # a line of the training's own that says so too
            if found and (result := TrainerResult.model_validate_json(text)).attempt_id == attempt_id:
                return result
    why = " ".join(job.message.split())
    raise TrainerError(
        f"The job on Ray ended as {job.status} without a result: {why or 'Ray gives no reason'}"
    )


def without_result(line: str) -> bool:
    """Whether a line of a job's output says something to people: the result is for the operator."""
    return bool(line.strip()) and RESULT_LINE not in line
