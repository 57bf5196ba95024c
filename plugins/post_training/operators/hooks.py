"""Hooks of the provider's two connection types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException
from pydantic import ValidationError

from post_training.errors import (
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    PostTrainingError,
    RecordUnavailableError,
)
from post_training.schemas.base import parse_json_object
from post_training.schemas.jobs import (
    ListPostTrainingJobsResponse,
    PostTrainingJobArtifactsResponse,
    PostTrainingJobLogStream,
    PostTrainingJobStatusResponse,
    ReconcileJobsResponse,
)
from post_training.schemas.requests import error_details
from post_training.schemas.training import RuntimeConfig
from post_training.settings import allowed_roots, deployment_name
from post_training.tracking import Tracking, TrackingServer

if TYPE_CHECKING:
    from airflow.sdk import Connection


TIMEOUT_SECONDS = 60.0
RECONCILE_SECONDS = 230.0
LOGIN_REFUSALS = (400, 401, 403, 422)
"""What Airflow answers to a wrong login; with anything else it may be right later."""


class MLflowHook(BaseHook):
    """The tracking server of a connection of type ``mlflow``.

    :param mlflow_conn_id: the connection; its host is the tracking URI, its extra may hold ``experiment``
        and ``public_url``.
    """

    conn_name_attr = "mlflow_conn_id"
    default_conn_name = "mlflow_default"
    conn_type = "mlflow"
    hook_name = "MLflow tracking server"

    def __init__(self, mlflow_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.mlflow_conn_id = mlflow_conn_id

    def get_conn(self) -> Tracking:
        """Return the access to the jobs' runs."""
        return Tracking(tracking_server(self.get_connection(self.mlflow_conn_id)))

    def test_connection(self) -> tuple[bool, str]:
        """Ask the server for its experiments; the button in the connection form."""
        try:
            self.get_conn().ping()
        except PostTrainingError as error:
            return False, str(error)
        return True, "MLflow answers"


def tracking_server(connection: Connection) -> TrackingServer:
    """Read a connection of type ``mlflow``.

    :raises ValueError: if it names no host, or a password inside it, which links and errors would show.
    """
    if not connection.host:
        raise ValueError(f"connection {connection.conn_id!r} has no host: it must be MLflow's tracking URI")
    if "@" in connection.host:
        raise ValueError(f"connection {connection.conn_id!r}: put the login beside the host, not into it")
    extra = connection.extra_dejson
    host = connection.host if "://" in connection.host else f"http://{connection.host}"
    port = f":{connection.port}" if connection.port else ""
    return TrackingServer(
        uri=f"{host.rstrip('/')}{port}",
        experiment=extra.get("experiment") or TrackingServer.experiment,
        username=connection.login or None,
        password=connection.password or None,
        public_url=extra.get("public_url") or None,
        deployment=deployment_name(),
        roots=allowed_roots(),
    )


class PostTrainingHook(BaseHook):
    """The HTTP API of a deployment, by a connection of type ``post_training``.

    :param post_training_conn_id: the connection; its host is the base URL that ends in ``/post-training``.
    :param transport: replaces the network in tests.
    """

    conn_name_attr = "post_training_conn_id"
    default_conn_name = "post_training_default"
    conn_type = "post_training"
    hook_name = "Post-training API"

    def __init__(
        self,
        post_training_conn_id: str = default_conn_name,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__()
        self.post_training_conn_id = post_training_conn_id
        self._transport = transport

    def get_conn(self) -> httpx.Client:
        """Return a client that is logged in.

        :raises RecordUnavailableError: if the server does not answer.
        :raises ForbiddenError: if it refuses the login.
        """
        connection = self.get_connection(self.post_training_conn_id)
        token = self._token(connection)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(
            base_url=_base_url(connection),
            headers=headers,
            timeout=TIMEOUT_SECONDS,
            transport=self._transport,
        )

    def _token(self, connection: Connection) -> str | None:
        if not connection.login:
            return connection.password
        url = _base_url(connection).removesuffix("/post-training") + "/auth/token"
        login = {"username": connection.login, "password": connection.password}
        with httpx.Client(timeout=TIMEOUT_SECONDS, transport=self._transport) as client, _answers():
            answer = client.post(url, json=login)
        if answer.status_code in LOGIN_REFUSALS:
            raise ForbiddenError(f"Airflow refuses the login of {connection.login!r}: {answer.status_code}")
        if answer.status_code != httpx.codes.CREATED:
            raise RecordUnavailableError(f"Airflow answers the login with {answer.status_code}")
        return str(_content(answer)["access_token"])

    def runtime_defaults(self) -> dict[str, Any]:
        """Return the connection's defaults of the runtime block; none without a connection.

        :raises InvalidRequestError: if they are no valid runtime block.
        """
        try:
            connection = self.get_connection(self.post_training_conn_id)
        except AirflowNotFoundException:
            return {}
        try:
            defaults = parse_json_object(connection.extra_dejson.get("runtime") or {})
            return RuntimeConfig.model_validate(defaults).model_dump(exclude_unset=True)
        except ValidationError as error:
            found = error_details(error.errors())
        except ValueError as error:
            found = [{"loc": [], "msg": str(error), "type": "json_invalid"}]
        place = f"connection {self.post_training_conn_id} extra runtime"
        raise InvalidRequestError([{**detail, "loc": [place, *detail["loc"]]} for detail in found])

    def list_jobs(self) -> ListPostTrainingJobsResponse:
        """Return all jobs that the connection's user may see."""
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
        :raises ForbiddenError: if the connection's user may see the job but no logs.
        """
        body = self._call("GET", "job/logs", job_uuid, params={"job_uuid": job_uuid, "offset": offset})
        return PostTrainingJobLogStream.model_validate(body)

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

    def test_connection(self) -> tuple[bool, str]:
        """List the jobs; the button in the connection form."""
        try:
            count = len(self.list_jobs().data)
        except PostTrainingError as error:
            return False, str(error)
        return True, f"{count} jobs"

    def _call(self, method: str, path: str, job_uuid: str = "", **kwargs: Any) -> Any:
        with self.get_conn() as client, _answers():
            answer = client.request(method, f"/v1alpha/post-training/{path}", **kwargs)
        if answer.is_success:
            return _content(answer)
        raise _error(answer, job_uuid)


def _base_url(connection: Connection) -> str:
    if not connection.host:
        raise ValueError(f"connection {connection.conn_id!r} has no host: it must be the API's base URL")
    host = connection.host if "://" in connection.host else f"http://{connection.host}"
    port = f":{connection.port}" if connection.port else ""
    return f"{host.rstrip('/')}{port}"


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


def _error(answer: httpx.Response, job_uuid: str) -> PostTrainingError:
    """Return the error of the tree that the API's answer stands for."""
    try:
        body = answer.json()
    except ValueError:  # a proxy's page
        body = {}
    detail: Any = body.get("detail", answer.reason_phrase) if isinstance(body, Mapping) else answer.text
    match answer.status_code:
        case 404:
            return JobNotFoundError(job_uuid)
        case 409:
            return JobConflictError(str(detail))
        case 401 | 403:
            return ForbiddenError(str(detail))
        case 400 if isinstance(detail, Mapping) and "errors" in detail:
            return InvalidRequestError(detail["errors"])
    return RecordUnavailableError(f"the post-training API answers {answer.status_code}: {detail}")
