"""The HTTP API of a deployment, as a connection's hook and the command line call it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import httpx

from post_training.certificates import certificates
from post_training.errors import (
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    PostTrainingError,
    RecordUnavailableError,
    RequestTooLargeError,
)
from post_training.schemas.jobs import (
    ListPostTrainingJobsResponse,
    PostTrainingJob,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobLogStream,
    PostTrainingJobStatusResponse,
    ReconcileJobsResponse,
)

MOUNT = "/post-training"
"""Where Airflow's api-server serves the API."""

TIMEOUT_SECONDS = 60.0
RECONCILE_SECONDS = 230.0
LOGIN_REFUSALS = (400, 401, 403, 422)
"""What Airflow answers to a wrong login; with anything else it may be right later."""


@dataclass(frozen=True)
class Patience:
    """How long a log is followed through an outage. All times in seconds.

    :param outage: after how long without an answer it is given up.
    :param pause: between two tries.
    """

    outage: float = 300.0
    pause: float = 2.0


class PostTrainingClient:
    """Calls the API; a token is fetched with the first call, and anew when it is no longer taken.

    :param url: base URL of the API, which ends in ``/post-training``.
    :param user: Airflow's name of the caller; without one ``secret`` is a token.
    :param secret: the user's password, or a token; without any the calls are anonymous.
    :param transport: replaces the network in tests.
    :param patience: how outages are waited out by who follows a log.
    """

    def __init__(
        self,
        url: str,
        *,
        user: str | None = None,
        secret: str | None = None,
        transport: httpx.BaseTransport | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._auth = _Login(f"{self.url.removesuffix(MOUNT)}/auth/token", user, secret)
        self._transport = transport
        self._patience = patience or Patience()

    def submit(self, method: str, body: Mapping[str, Any]) -> PostTrainingJob:
        """Start a job, or find the one that the same request has started before.

        :param method: supervised_fine_tune or preference_optimize.
        :param body: the request.
        :raises InvalidRequestError: naming each field, rule and value.
        :raises JobConflictError: if another request has this job_uuid.
        """
        return PostTrainingJob.model_validate(self._call("POST", method.replace("_", "-"), json=dict(body)))

    def list_jobs(self) -> ListPostTrainingJobsResponse:
        """Return all jobs that the user may see, newest first."""
        return ListPostTrainingJobsResponse.model_validate(self._call("GET", "jobs"))

    def job_status(self, job_uuid: str) -> PostTrainingJobStatusResponse:
        """Return a job's status.

        :raises JobNotFoundError: if there is no such job.
        """
        body = self._call("GET", "job/status", job_uuid, params={"job_uuid": job_uuid})
        return PostTrainingJobStatusResponse.model_validate(body)

    def job_artifacts(self, job_uuid: str) -> PostTrainingJobArtifactsResponse:
        """Return a job's checkpoints.

        :raises JobNotFoundError: if there is no such job.
        """
        body = self._call("GET", "job/artifacts", job_uuid, params={"job_uuid": job_uuid})
        return PostTrainingJobArtifactsResponse.model_validate(body)

    def job_logs(self, job_uuid: str, offset: int = 0) -> PostTrainingJobLogStream:
        """Return one page of a job's log, from line ``offset`` on; it names the next page's offset.

        :raises JobNotFoundError: if there is no such job.
        :raises ForbiddenError: if the user may see the job but no logs.
        """
        body = self._call("GET", "job/logs", job_uuid, params={"job_uuid": job_uuid, "offset": offset})
        return PostTrainingJobLogStream.model_validate(body)

    def follow_logs(
        self, job_uuid: str, offset: int = 0
    ) -> Iterator[PostTrainingJobLogStream | PostTrainingJobStatusResponse]:
        """Yield a job's log as it grows, from line ``offset`` on, and last the ended job's status.

        A stream that is cut goes on where it was.

        :raises JobNotFoundError: if there is no such job.
        :raises ForbiddenError: if the user may see the job but no logs.
        :raises RecordUnavailableError: if the API does not answer, and later after an outage of ``patience``.
        """
        opened = False
        failing_since: float | None = None
        while True:
            try:
                for event in self._log_events(job_uuid, offset):
                    opened, failing_since = True, None
                    if event.name == "status":
                        yield PostTrainingJobStatusResponse.model_validate_json(event.data)
                        return
                    if event.name == "log":
                        offset = int(event.id)
                        yield PostTrainingJobLogStream.model_validate_json(event.data)
            except RecordUnavailableError:
                failing_since = failing_since or monotonic()
                if not opened or monotonic() - failing_since > self._patience.outage:
                    raise
            time.sleep(self._patience.pause)

    def cancel_job(self, job_uuid: str) -> None:
        """Stop a job.

        :raises JobNotFoundError: if there is no such job.
        :raises JobConflictError: if it has ended.
        """
        self._call("POST", "job/cancel", job_uuid, json={"job_uuid": job_uuid})

    def reconcile(self) -> ReconcileJobsResponse:
        """Let the deployment bring MLflow's open runs and Airflow's tasks to agree."""
        return ReconcileJobsResponse.model_validate(
            self._call("POST", "reconcile", timeout=RECONCILE_SECONDS)
        )

    def _call(self, method: str, path: str, job_uuid: str = "", **kwargs: Any) -> Any:
        with self._http() as http, _answers():
            answer = http.request(method, path, **kwargs)
        if answer.is_success:
            return _content(answer)
        raise _error(answer, job_uuid)

    def _log_events(self, job_uuid: str, offset: int) -> Iterator[_Event]:
        """Yield the events of one stream, an empty one first: it was opened."""
        params: dict[str, str | int] = {"job_uuid": job_uuid, "offset": offset}
        headers = {"Accept": "text/event-stream"}
        with self._http() as http, _answers():
            with http.stream("GET", "job/logs", params=params, headers=headers) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _error(answer, job_uuid)
                yield _Event()
                yield from _events(answer.iter_lines())

    def _http(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"{self.url}/v1alpha/post-training/",
            auth=self._auth,
            timeout=TIMEOUT_SECONDS,
            transport=self._transport,
            verify=certificates(),
        )


class _Login(httpx.Auth):
    """Fetches a token for a user, and sends it with each call."""

    def __init__(self, url: str, user: str | None, secret: str | None) -> None:
        self._url = url
        self._user = user
        self._secret = secret
        self._token = None if user else secret

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request, logged in.

        :raises ForbiddenError: if Airflow refuses the login.
        :raises RecordUnavailableError: if it answers the login with anything but a token.
        """
        known = self._token is not None
        if self._user and not known:
            yield from self._log_in()
        answer = yield self._signed(request)
        if answer.status_code == httpx.codes.UNAUTHORIZED and self._user and known:  # it was too old
            yield from self._log_in()
            yield self._signed(request)

    def _signed(self, request: httpx.Request) -> httpx.Request:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request

    def _log_in(self) -> Generator[httpx.Request, httpx.Response, None]:
        answer = yield httpx.Request(
            "POST", self._url, json={"username": self._user, "password": self._secret}
        )
        answer.read()
        if answer.status_code in LOGIN_REFUSALS:
            raise ForbiddenError(f"Airflow refuses the login of {self._user!r}: {answer.status_code}")
        if answer.status_code != httpx.codes.CREATED:
            raise RecordUnavailableError(f"Airflow answers the login with {answer.status_code}")
        self._token = str(_content(answer)["access_token"])


@dataclass(frozen=True)
class _Event:
    """A server-sent event."""

    name: str = ""
    id: str = ""
    data: str = ""


def _events(lines: Iterable[str]) -> Iterator[_Event]:
    """Read server-sent events; comments, which keep the connection alive, have no name.

    What follows the last blank line was cut and counts for nothing.
    """
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name:
            fields[name] = value.removeprefix(" ")
        elif not line:
            yield _Event(fields.get("event", ""), fields.get("id", ""), fields.get("data", ""))
            fields = {}


@contextmanager
def _answers() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise RecordUnavailableError(f"the post-training API does not answer: {error}") from error


def _content(answer: httpx.Response) -> Any:
    """Return what a successful answer holds.

    :raises RecordUnavailableError: if it is no JSON: it comes from something between us and the API.
    """
    try:
        return answer.json()
    except ValueError:
        raise RecordUnavailableError(
            f"the post-training API answers {answer.status_code} without JSON"
        ) from None


_ERRORS: dict[int, Callable[[str], PostTrainingError]] = {
    401: ForbiddenError,
    403: ForbiddenError,
    409: JobConflictError,
    413: RequestTooLargeError,
}


def _error(answer: httpx.Response, job_uuid: str) -> PostTrainingError:
    """Return the error of the tree that the API's answer stands for.

    :param job_uuid: of the job that was asked for; empty where none was.
    """
    try:
        body = answer.json()
    except ValueError:  # a proxy's page
        body = {}
    detail: Any = body.get("detail", answer.reason_phrase) if isinstance(body, Mapping) else answer.text
    if answer.status_code == 404:
        return _not_found(answer.url, detail, job_uuid)
    if answer.status_code == 400 and isinstance(detail, Mapping) and "errors" in detail:
        return InvalidRequestError(detail["errors"])
    if answer.status_code in _ERRORS:
        return _ERRORS[answer.status_code](str(detail))
    return RecordUnavailableError(f"the post-training API answers {answer.status_code}: {detail}")


def _not_found(url: httpx.URL, detail: Any, job_uuid: str) -> PostTrainingError:
    """Tell an unknown job from an address at which no API of ours is: that one has no such sentence."""
    unknown = JobNotFoundError(job_uuid)
    if detail == str(unknown):
        return unknown
    where = url.copy_with(query=None)
    return RecordUnavailableError(f"{where} answers 404: {detail}; is it the post-training API's?")
