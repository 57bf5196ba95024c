"""Hooks of the provider's two connection types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException
from pydantic import ValidationError

from post_training.client import PostTrainingClient
from post_training.errors import InvalidRequestError, PostTrainingError
from post_training.schemas.base import parse_json_object
from post_training.schemas.requests import error_details
from post_training.schemas.training import RuntimeConfig
from post_training.settings import allowed_roots, deployment_name
from post_training.tracking import Tracking, TrackingServer

if TYPE_CHECKING:
    from airflow.sdk import Connection


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

    def get_conn(self) -> PostTrainingClient:
        """Return a client of the API, which logs in with its first call."""
        connection = self.get_connection(self.post_training_conn_id)
        return PostTrainingClient(
            _base_url(connection),
            user=connection.login or None,
            secret=connection.password or None,
            transport=self._transport,
        )

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

    def test_connection(self) -> tuple[bool, str]:
        """List the jobs; the button in the connection form."""
        try:
            count = len(self.get_conn().list_jobs().data)
        except PostTrainingError as error:
            return False, str(error)
        return True, f"{count} jobs"


def _base_url(connection: Connection) -> str:
    if not connection.host:
        raise ValueError(f"connection {connection.conn_id!r} has no host: it must be the API's base URL")
    host = connection.host if "://" in connection.host else f"http://{connection.host}"
    port = f":{connection.port}" if connection.port else ""
    return f"{host.rstrip('/')}{port}"
