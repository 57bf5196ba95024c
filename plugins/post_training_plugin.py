"""The Airflow plugin: mounts the HTTP API into the api-server, and shows its page in Airflow's own.

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


_PAGE = "post-training/ui/"  # relative: Airflow may be served below any path
_ICONS = {
    "icon": f"{_PAGE}static/current/icon.svg",
    "icon_dark_mode": f"{_PAGE}static/current/icon-dark.svg",
}


class PostTrainingPlugin(AirflowPlugin):
    """``/post-training`` on Airflow's own api-server, its page, and a listener to Airflow's pages."""

    name = "post_training"
    fastapi_apps = [{"app": LazyApp(), "url_prefix": "/post-training", "name": "Post-training"}]  # noqa: RUF012
    external_views = [  # noqa: RUF012
        {
            "name": "Post-training",
            "href": _PAGE,
            "destination": "nav",
            "url_route": "post-training",
            **_ICONS,
        },
        {
            "name": "Post-training",
            "href": f"{_PAGE}run?dag_id={{DAG_ID}}&run_id={{RUN_ID}}",
            "destination": "dag_run",
            "url_route": "post-training-run",
            **_ICONS,
        },
    ]
    listeners = [listener]  # noqa: RUF012
