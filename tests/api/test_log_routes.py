"""A job's log over HTTP: its pages, and its events on a real server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import fastapi.routing
import pytest
from fastapi.testclient import TestClient

from post_training.airflow_runs import JobTask
from post_training.api.capacity import Capacity, Places, Threads
from tests.api.conftest import Deployment
from tests.api.server import KEY, PATHS, QUICK, STREAM, Server, set_task
from tests.fakes import FakeAccess, FakeRuns, task
from tests.sse import lines_of
from tests.waiting import wait_until


def end(deployment: Any, attempt: int = 1) -> None:
    """Let the job have completed."""
    deployment.tracking.set_status("run-1", "FINISHED")
    set_task(deployment, "success", attempt)


@pytest.fixture
def job(deployment: Deployment) -> Deployment:
    """A job that runs, with three lines so far."""
    tags = {"post_training.job_uuid": "job-1", "airflow.dag_id": KEY.dag_id}
    deployment.tracking.create_run(name="job-1", experiment=None, tags=tags, params={}, request={})
    deployment.tracking.set_status("run-1", "RUNNING")
    deployment.runs.logs["job-1"] = [["a0", "a1", "a2"]]
    set_task(deployment, "running", 1)
    return deployment


@pytest.fixture
def server(job: Deployment) -> Iterator[Server]:
    """One thread reads all logs, and three clients may follow."""
    with Server(job, Capacity(Threads(2, 60.0), Threads(1, 60.0), Places(3, 3))) as server:
        yield server


class Looks:
    """Counts the looks at each job's task."""

    def __init__(self, runs: FakeRuns, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self._find = runs.find
        monkeypatch.setattr(runs, "find", self._counted)

    def _counted(self, job_uuid: str) -> JobTask | None:
        self.seen.append(job_uuid)
        return self._find(job_uuid)

    def wait_for(self, more: int, job_uuid: str = "job-1") -> None:
        """Wait for so many more; one step of a follower makes at most two."""
        wanted = self.seen.count(job_uuid) + more
        wait_until(lambda: self.seen.count(job_uuid) >= wanted)


@pytest.fixture
def looks(server: Server, monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(server.runs, monkeypatch)


@contextmanager
def once_admitted(server: Server, path: str) -> Iterator[None]:
    """Follow a log as soon as there is room."""
    with server.http() as http, ExitStack() as stack:

        def admitted() -> bool:
            with ExitStack() as attempt:
                answer = attempt.enter_context(http.stream("GET", path, headers=STREAM))
                assert answer.status_code in (200, 503)
                if answer.is_success:
                    stack.push(attempt.pop_all())
            return answer.is_success

        wait_until(admitted)
        yield


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_knows_no_paging_gets_the_log(job: Deployment, path: str) -> None:
    whole = {"job_uuid": "job-1", "log_lines": ["a0", "a1", "a2"], "next_offset": None}
    for accept in ("*/*", "application/json", "text/event-streams"):
        answer = job.client().get(path, headers={"Accept": accept})
        assert (answer.status_code, answer.json()) == (200, whole)


@pytest.mark.parametrize("path", PATHS)
def test_pages(job: Deployment, path: str) -> None:
    page = job.client().get(f"{path}&limit=2").json()
    assert (page["log_lines"], page["next_offset"]) == (["a0", "a1"], 2)
    page = job.client().get(f"{path}&limit=2&offset=2").json()
    assert (page["log_lines"], page["next_offset"]) == (["a2"], None)


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("offset=-1", "offset"),
        ("offset=x", "offset"),
        ("offset=99999999999999999999", "offset"),
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
    ],
)
def test_a_bad_page_is_400(job: Deployment, accept: str, query: str, field: str) -> None:
    answer = job.client().get(f"{PATHS[0]}&{query}", headers={"Accept": accept})
    assert answer.status_code == 400
    assert answer.json()["detail"]["errors"][0]["loc"] == [field]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_refused_is_answered_before_the_stream(job: Deployment, path: str) -> None:
    job.callers["blind"] = FakeAccess("blind", logs=False)
    for caller, status in (("nobody", 401), ("blind", 403), ("stranger", 404)):
        assert job.client(caller).get(path, headers=STREAM).status_code == status
    bad = job.client().get(path, headers=STREAM | {"Last-Event-ID": "-3"})
    assert bad.json()["detail"]["errors"][0]["loc"] == ["header", "last-event-id"]
    job.runs.down = True
    answer = job.client().get(path, headers=STREAM)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")


def test_a_stream_follows_the_job_over_its_retries_to_its_status(server: Server, looks: Looks) -> None:
    attempts = server.runs.logs["job-1"]
    with server.follow() as stream:
        assert next(stream) == (
            "log",
            "3",
            {"job_uuid": "job-1", "log_lines": ["a0", "a1", "a2"], "next_offset": None},
        )
        attempts[0].append("killed")
        assert next(stream)[1:] == ("4", {"job_uuid": "job-1", "log_lines": ["killed"], "next_offset": None})
        set_task(server, "up_for_retry", 1)
        looks.wait_for(4)
        set_task(server, "running", 2)
        attempts.append(["b0"])
        assert lines_of([next(stream)]) == ["b0"]
        server.tracking.set_status("run-1", "FINISHED")
        looks.wait_for(4)
        attempts[1].append("done")
        set_task(server, "success", 2)
        last = list(stream)
    assert lines_of(last) == ["done"]
    assert [event for event, _, _ in last] == ["log", "status"]
    with server.http() as http:
        status = http.get("/v1/post-training/jobs/job-1/status").json()
    assert status["status"] == "completed"
    assert last[-1][2] == status


def test_a_stream_waits_for_a_job_that_has_not_begun(server: Server, looks: Looks) -> None:
    server.runs.logs.clear()
    set_task(server, None, 0)
    with server.follow() as stream:
        looks.wait_for(4)
        server.runs.logs["job-1"] = [["first"]]
        set_task(server, "running", 1)
        assert lines_of([next(stream)]) == ["first"]


@pytest.mark.parametrize(
    ("query", "headers", "lines"),
    [
        ("&offset=1", {}, ["a1", "a2"]),
        ("", {"Last-Event-ID": "2"}, ["a2"]),
        ("&offset=1", {"Last-Event-ID": "3"}, []),
    ],
)
def test_a_stream_begins_where_it_is_told(
    server: Server, query: str, headers: dict[str, str], lines: list[str]
) -> None:
    end(server)
    with server.follow(query, **headers) as stream:
        assert lines_of(list(stream)) == lines


def test_the_limit_is_that_of_an_event(server: Server) -> None:
    end(server)
    with server.follow("&limit=2") as stream:
        found = list(stream)
    assert [(event, at) for event, at, _ in found] == [("log", "2"), ("log", "3"), ("status", "")]


def test_a_small_limit_makes_many_events_of_few_looks(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"line {number}" for number in range(3_000)]
    server.runs.logs["job-1"] = [lines]
    end(server)
    reads = []
    read = server.runs.log_lines
    monkeypatch.setattr(server.runs, "log_lines", lambda *place: (reads.append(place), read(*place))[1])
    with server.follow("&limit=1") as stream:
        found = list(stream)
    assert [at for _, at, _ in found] == [*(str(number) for number in range(1, 3_001)), ""]
    assert lines_of(found) == lines
    assert len(reads) < 20


def test_one_users_clients_leave_places_to_others(job: Deployment) -> None:
    capacity = Capacity(followers=Places(3, of_one_user=1))
    with Server(job, capacity) as server, server.follow() as stream:
        next(stream)
        for caller, status in (("admin", 503), ("viewer", 200)):
            with server.http(caller) as http, http.stream("GET", PATHS[0], headers=STREAM) as answer:
                assert answer.status_code == status


def test_a_stream_that_has_lived_long_ends_without_a_status_and_goes_on(job: Deployment) -> None:
    with Server(job, Capacity(), replace(QUICK, life=0.3)) as server:
        began = monotonic()
        with server.follow() as stream:
            assert [(event, at) for event, at, _ in stream] == [("log", "3")]
        assert monotonic() - began >= 0.3
    end(job)
    with Server(job, Capacity()) as server, server.follow(**{"Last-Event-ID": "3"}) as stream:
        assert [event for event, _, _ in stream] == ["status"]


def test_a_client_that_does_not_read_loses_its_place(job: Deployment) -> None:
    job.runs.logs["job-1"] = [["x" * 100_000] * 200]  # more than the sockets' buffers hold
    capacity = Capacity(followers=Places(1, 1))
    with Server(job, capacity, send_seconds=6.0) as server, socket.socket() as deaf, server.http() as http:
        deaf.connect(("127.0.0.1", server.port))
        lines = [f"GET /post-training{PATHS[0]}&limit=1 HTTP/1.1", "Host: a", "Authorization: Bearer admin"]
        deaf.sendall("\r\n".join([*lines, f"Accept: {STREAM['Accept']}", "", ""]).encode())
        assert deaf.recv(15) == b"HTTP/1.1 200 OK"
        answers = []

        def admitted() -> bool:
            with http.stream("GET", PATHS[0], headers=STREAM) as answer:
                answers.append(answer.status_code)
            return answer.is_success

        wait_until(admitted)
        assert answers[0] == 503


def test_any_character_survives(server: Server) -> None:
    server.runs.logs["job-1"] = [["a\u2028b\u0085c\nd\re \U0001f600 \x0b\x1c"]]
    end(server)
    with server.follow() as stream:
        assert lines_of(list(stream)) == server.runs.logs["job-1"][0]


def test_an_outage_is_waited_out(server: Server, looks: Looks) -> None:
    with server.follow() as stream:
        next(stream)
        server.runs.down = True
        looks.wait_for(4)
        server.runs.logs["job-1"][0].append("a3")
        server.runs.down = False
        assert lines_of([next(stream)]) == ["a3"]
        server.tracking.set_status("run-1", "FINISHED")
        server.tracking.down = True
        set_task(server, "success", 1)
        looks.wait_for(4)
        server.tracking.down = False
        assert [event for event, _, _ in stream] == ["status"]


def test_who_loses_the_right_to_read_is_told_no_more(
    job: Deployment, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = job.runs.find

    def lose_it(job_uuid: str) -> JobTask | None:
        job.callers["admin"].logs = False
        job.runs.logs["job-1"][0].append("secret")
        return find(job_uuid)

    with server.follow() as stream:
        next(stream)
        monkeypatch.setattr(job.runs, "find", lose_it)  # at a look's beginning, not in its middle
        assert next(stream, None) is None


def test_an_idle_stream_beats(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.05)
    with server.follow() as stream:
        ping = ("", "", "ping")
        assert next(event for event in stream if event != ping)[0] == "log"
        assert next(stream) == ping
        assert next(stream) == ping


def test_so_many_follow_at_once_and_who_leaves_makes_room(server: Server) -> None:
    with server.follow() as one, server.follow() as two:
        with server.follow() as three:
            assert [next(stream)[1] for stream in (one, two, three)] == ["3", "3", "3"]
            with server.http() as http:
                full = http.get(PATHS[0], headers=STREAM)
                assert (full.status_code, full.headers["retry-after"]) == (503, "5")
                assert http.get(PATHS[0]).status_code == 200
        with once_admitted(server, PATHS[0]):
            pass


def test_nothing_is_read_for_who_has_left(job: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(job.runs, monkeypatch)
    job.runs.add(task(replace(KEY, run_id="job-2"), "running"))
    with Server(job, Capacity(followers=Places(1, 1))) as server:
        with server.follow() as stream:
            next(stream)
            looks.wait_for(4)
        with once_admitted(server, PATHS[0].replace("job-1", "job-2")):
            before = looks.seen.count("job-1")
            looks.wait_for(20, "job-2")
            assert looks.seen.count("job-1") == before


def test_the_description_tells_of_both(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    operation = paths["/v1/post-training/jobs/{job_uuid}/logs"]["get"]
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    described = {parameter["name"]: parameter for parameter in operation["parameters"]}
    assert set(described) == {"job_uuid", "offset", "limit", "Last-Event-ID"}
    assert (described["Last-Event-ID"]["in"], described["Last-Event-ID"]["required"]) == ("header", False)
    assert described["Last-Event-ID"]["schema"]["minimum"] == 0
