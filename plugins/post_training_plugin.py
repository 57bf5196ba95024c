"""The Airflow plugin: mounts the HTTP API into the api-server.

Airflow executes this file in every one of its processes, so nothing is built before the first request.
"""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin

from post_training import listener


class LazyApp:
    """ASGI application that is built by its first request."""

    def __init__(self) -> None:
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if self._app is None:
            from post_training.api.airflow_app import build_app  # noqa: PLC0415

            self._app = build_app()
        await self._app(scope, receive, send)


class PostTrainingPlugin(AirflowPlugin):
    """``/post-training`` on Airflow's own api-server, and a listener to what is done in its pages."""

    name = "post_training"
    fastapi_apps = [{"app": LazyApp(), "url_prefix": "/post-training", "name": "Post-training"}]  # noqa: RUF012
    listeners = [listener]  # noqa: RUF012
