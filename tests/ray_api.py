"""The Jobs API of a Ray cluster, as far as we use it, over jobs of which the test says how they go."""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "a-token-of-the-tests-alone"


@dataclass
class Job:
    """A job that was submitted."""

    body: dict[str, Any]
    status: str = "RUNNING"
    message: str = ""
    log: str = ""


@dataclass
class RayApi:
    """A server on loopback."""

    jobs: dict[str, Job] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    loses_answers: bool = False
    refuses: str = ""

    def __post_init__(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            do_PUT = do_POST = do_GET

            def _answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                code, answer = 401, "Unauthorized"
                if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                    code, answer = api.answer(self.command, self.path, content)
                self.send_response(code)
                self.end_headers()
                self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

            def log_message(self, format: str, *args: Any) -> None:
                """Be quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()

    def spec_of(self, submission_id: str) -> dict[str, Any]:
        """The spec in the folder that a job starts in."""
        uri = self.jobs[submission_id].body["runtime_env"]["working_dir"]
        with zipfile.ZipFile(io.BytesIO(self.packages[uri.removeprefix("gcs://")])) as archive:
            return dict(json.loads(archive.read("spec.json")))

    def answer(self, method: str, path: str, content: bytes) -> tuple[int, Any]:
        """Do what a call asks for."""
        if found := re.fullmatch("/api/packages/gcs/(.+)", path):
            return self._package(method, found[1], content)
        if (method, path) == ("POST", "/api/jobs/"):
            return self._submit(json.loads(content))
        found = re.fullmatch("/api/jobs/([^/]+)(/stop|/logs)?", path)
        if found is None or found[1] not in self.jobs:
            return 404, "Job does not exist"
        job = self.jobs[found[1]]
        if found[2] == "/logs":
            return 200, {"logs": job.log}
        if found[2] == "/stop":
            self.stopped.append(found[1])
            job.status = "STOPPED"
            return 200, {"stopped": True}
        return 200, {"status": job.status, "message": job.message}

    def _package(self, method: str, name: str, content: bytes) -> tuple[int, str]:
        if method == "PUT":
            self.packages[name] = content
        return (200, "") if name in self.packages else (404, "does not exist")

    def _submit(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.refuses:
            return 400, f"Traceback (most recent call last):\n  File\nValueError: {self.refuses}"
        if body["submission_id"] in self.jobs:
            return 400, "ValueError: a job of this id already exists"
        self.jobs[body["submission_id"]] = Job(body)
        return (500, "lost") if self.loses_answers else (200, {"submission_id": body["submission_id"]})
