"""An HTTP client that asks again, as the published one does, and until the servers are back."""

from __future__ import annotations

from time import monotonic, sleep
from typing import Any

import httpx

from post_training.standalone import Standalone
from tests.chaos.workload import KINDS

RETRIED = frozenset({408, 429, *range(500, 600)})
ENDED = frozenset({"completed", "failed", "cancelled"})
_PATIENCE_SECONDS = 300.0


class Client:
    """The jobs of one deployment, over HTTP.

    :param servers: running; the token is fetched once and outlives an api-server.
    """

    def __init__(self, servers: Standalone) -> None:
        headers = {"Authorization": f"Bearer {servers.token()}"}
        self._http = httpx.Client(base_url=servers.airflow_url, headers=headers, timeout=30)

    def submit(self, kind: str, body: dict[str, Any]) -> None:
        """Create a job; the same request again is the same job."""
        path = f"/post-training/v1/post-training/{KINDS[kind].method}"
        assert self._ask("POST", path, json=body).raise_for_status().json() == {"job_uuid": body["job_uuid"]}

    def status(self, job_uuid: str) -> dict[str, Any]:
        """Return the job's status as the API does."""
        path = "/post-training/v1/post-training/job/status"
        return dict(self._ask("GET", path, params={"job_uuid": job_uuid}).raise_for_status().json())

    def cancel(self, job_uuid: str) -> bool:
        """Cancel the job; False if it had ended otherwise: an answer may be lost, and is asked for again."""
        answer = self._ask("POST", "/post-training/v1/post-training/job/cancel", json={"job_uuid": job_uuid})
        if answer.status_code == httpx.codes.CONFLICT:
            return "has ended: cancelled" in answer.text
        answer.raise_for_status()
        return True

    def task(self, kind: str, job_uuid: str) -> dict[str, Any]:
        """Return Airflow's task instance of the job."""
        dag_id = KINDS[kind].method.replace("-", "_")
        path = f"/api/v2/dags/{dag_id}/dagRuns/{job_uuid}/taskInstances/train"
        return dict(self._ask("GET", path).raise_for_status().json())

    def _ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        deadline, pause = monotonic() + _PATIENCE_SECONDS, 0.5
        while True:
            try:
                answer = self._http.request(method, path, **arguments)
                if answer.status_code not in RETRIED or monotonic() > deadline:
                    return answer
            except httpx.TransportError:
                if monotonic() > deadline:
                    raise
            sleep(pause)
            pause = min(pause * 2, 8.0)
