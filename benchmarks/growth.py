"""How submit, list, status and the page behave as jobs grow in number, on PostgreSQL.

``python -m benchmarks.growth`` starts the services of docker/compose.yaml as processes and trains one job.
Then it ends all that starts jobs, and copies the job's record inside both databases. Measured is through
HTTP: first one client alone, then several at once with other numbers of API workers. Client, servers and
databases share this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL, create_engine

from benchmarks.machine import machine
from benchmarks.orchestration import API, body, read_status, submit, timed, wait_until_ended, write_data
from benchmarks.seeding import AIRFLOW, FAILED_OF, MLFLOW, Database, Pattern, pattern_of
from cluster.cluster import Cluster
from tests.waiting import wait_until

PAGE = "/post-training/ui/data"
SHOWN = 25
"""Jobs of a page."""

STARTERS = ("scheduler", "dag-processor", "triggerer", "worker-default", "worker-cpu")
"""Services without which no job starts; each is one process."""

SECONDS, LEAST = 8.0, 3
"""How long an operation is repeated at most, and how often at least."""

AT_ONCE = ("job/status", "page: newest 25", "submit")
"""Operations that are measured with several clients, too."""

ENDED, WAITING = "ended", "waiting"
ALONE, TOGETHER = "one client", "clients at once"
COPIED, LOAD = "records copied in (s)", "load of the machine"
TIMES = frozenset({"scheduled_at", "started_at", "completed_at", "created_at", "path"})
"""What a copy has of its own in an answer, besides its name."""

Call = Callable[[int], httpx.Response]


@dataclass(frozen=True)
class Servers:
    """What is measured, and where its records are.

    :param new_body: makes a request that was not submitted yet, for whichever thread asks.
    """

    cluster: Cluster
    airflow: Database
    mlflow: Database
    new_body: Callable[[], dict[str, Any]]

    @classmethod
    def of(cls, cluster: Cluster, model: Path, data: Path) -> Servers:
        """Find the databases of a cluster that runs."""
        numbers = count()
        airflow, mlflow = (create_engine(_database_url(cluster, name)) for name in ("airflow", "mlflow"))
        return cls(
            cluster,
            Database(airflow, AIRFLOW),
            Database(mlflow, MLFLOW),
            lambda: body(f"submitted-{next(numbers)}", model, data),
        )

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Sign in."""
        headers = {"Authorization": f"Bearer {self.cluster.token()}"}
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(
            base_url=self.cluster.airflow_url, headers=headers, timeout=600, limits=limits
        ) as http:
            yield http

    def copy(self, pattern: Pattern, numbers: range) -> float:
        """Copy a job in both databases; return the seconds that it took."""

        def both() -> None:
            for database in (self.airflow, self.mlflow):
                database.copy(pattern, numbers)

        return timed(both)


def main() -> None:
    """Measure everything once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument(
        "--jobs", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="numbers of jobs"
    )
    parser.add_argument("--waiting", type=int, default=1000, help="jobs that wait, beside the most jobs")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of API workers")
    parser.add_argument("--clients", type=int, default=8, help="clients at once, for each number of workers")
    parser.add_argument("--calls", type=int, default=20, help="calls behind each median")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, data = write_data(Path(folder))
        figures: dict[str, dict[str, Any]] = {"machine": machine()}
        with Cluster(Path(folder) / "home", variables={"DATA": str(data)}, timeout=1800) as cluster:
            for kind, name, found in measured(Servers.of(cluster, model, data), options):
                figures.setdefault(kind, {})[name] = found
                if options.json:
                    options.json.write_text(json.dumps(figures, indent=1))
    for kind in (ALONE, TOGETHER):
        show(kind, figures[kind])


def measured(servers: Servers, options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the figures of one column after the other: the table's name, the column's, and by row."""
    ended, waiting = make_patterns(servers)
    last = 0
    with servers.client() as http:
        for jobs in sorted(options.jobs):
            new = range(last + 1, last + 1 + max(0, jobs - present(http)))
            seconds = servers.copy(ended, new) if new else 0.0
            last = new.stop - 1
            check_copies(http, ended, last - last % FAILED_OF - 1)
            yield ALONE, f"{jobs:,} jobs", {**alone(http, servers, last, options.calls), COPIED: seconds}
        if options.waiting:
            seconds = servers.copy(waiting, range(1, options.waiting + 1))
            check_copies(http, waiting, options.waiting)
            column = f"and {options.waiting:,} that wait"
            yield ALONE, column, {**alone(http, servers, last, options.calls), COPIED: seconds}
    for workers in options.workers:
        serve(servers.cluster, workers)
        found = together(servers, last, options.clients, options.calls)
        yield TOGETHER, f"{workers} API workers", found


def make_patterns(servers: Servers) -> tuple[Pattern, Pattern]:
    """Train one job, end what starts jobs, submit one that waits; return both."""
    names = [f"pattern-of-{kind}" for kind in (ENDED, WAITING)]
    with servers.client() as http:
        wait_until(lambda: http.get("/api/v2/dags/supervised_fine_tune").is_success)
        submit(http, servers.new_body() | {"job_uuid": names[0]})
        wait_until_ended(http, names[0])
        for name in STARTERS:
            servers.cluster.kill(name)
        submit(http, servers.new_body() | {"job_uuid": names[1]})
    ended, waiting = (
        pattern_of(servers.airflow, servers.mlflow, name, f"{kind}-")
        for name, kind in zip(names, (ENDED, WAITING), strict=True)
    )
    return replace(ended, fails=True), waiting


def present(http: httpx.Client) -> int:
    """Return how many jobs there are."""
    return int(http.get(f"{PAGE}/jobs", params={"limit": 1}).raise_for_status().json()["total"])


def check_copies(http: httpx.Client, pattern: Pattern, number: int) -> None:
    """See that a copy is answered as its pattern is, and that there is nothing to mend.

    :raises AssertionError: if it is not.
    """
    copy = f"{pattern.prefix}{number}"
    for answer in (read_status, _row):
        answers = {name: _comparable(answer(http, name), name) for name in (pattern.job_uuid, copy)}
        assert answers[copy] == answers[pattern.job_uuid], answers
    mended = http.post(f"{API}/reconcile").raise_for_status().json()
    assert not mended["mended"] + mended["failed"] + mended["stopped"] + mended["discarded"], mended


def _row(http: httpx.Client, job_uuid: str) -> Any:
    found = http.get(f"{PAGE}/jobs", params={"run_id": job_uuid}).raise_for_status().json()
    return found["jobs"]


def _comparable(answer: Any, job_uuid: str) -> Any:
    """Return an answer without the job's name and times."""
    if isinstance(answer, Mapping):
        return {key: _comparable(value, job_uuid) for key, value in answer.items() if key not in TIMES}
    if isinstance(answer, list):
        return [_comparable(value, job_uuid) for value in answer]
    return answer.replace(job_uuid, "") if isinstance(answer, str) else answer


def operations(http: httpx.Client, servers: Servers, last: int) -> dict[str, Call]:
    """Return what is measured; each is told its number among so many calls.

    :param last: number of the oldest copy.
    """

    def asked(number: int) -> str:
        return f"{ENDED}-{1 + number * 7919 % last}"

    def page(**params: Any) -> Call:
        return lambda _: http.get(f"{PAGE}/jobs", params={"limit": SHOWN, **params})

    return {
        "GET jobs, all ids": lambda _: http.get(f"{API}/jobs"),
        "job/status": lambda n: http.get(f"{API}/job/status", params={"job_uuid": asked(n)}),
        "job/artifacts": lambda n: http.get(f"{API}/job/artifacts", params={"job_uuid": asked(n)}),
        "page: newest 25": page(),
        "page: oldest 25": page(offset=max(0, last - SHOWN)),
        "page: those that failed": page(status="failed"),
        "page: a text of one job": lambda n: page(text=asked(n))(n),
        "page: a text of all jobs": page(text="tiny-llama"),
        "page: one job": lambda n: http.get(f"{PAGE}/job", params={"job_uuid": asked(n)}),
        "reconcile": lambda _: http.post(f"{API}/reconcile"),
        "submit": lambda _: http.post(f"{API}/supervised-fine-tune", json=servers.new_body()),
    }


def seconds_of(call: Call, number: int) -> float:
    """Return how long a call takes that succeeds."""
    return timed(lambda: call(number).raise_for_status())


def alone(http: httpx.Client, servers: Servers, last: int, calls: int) -> dict[str, Any]:
    """Measure every operation, call by call."""
    found: dict[str, Any] = {}
    for name, call in operations(http, servers, last).items():
        call(0).raise_for_status()  # what is read for the first time comes from the disk
        seconds: list[float] = []
        while len(seconds) < LEAST or (len(seconds) < calls and sum(seconds) < SECONDS):
            seconds.append(seconds_of(call, len(seconds) + 1))
        found[name] = spread(seconds)
    return {**found, LOAD: os.getloadavg()[0]}


def together(servers: Servers, last: int, clients: int, calls: int) -> dict[str, Any]:
    """Measure some operations with several clients at once.

    :param last: number of the oldest copy.
    :param calls: of each client.
    """
    found: dict[str, Any] = {}
    with servers.client() as http, ThreadPoolExecutor(clients) as pool:
        every = operations(http, servers, last)
        for name in AT_ONCE:
            start = perf_counter()
            seconds = list(pool.map(partial(seconds_of, every[name]), range(clients * calls)))
            found[name] = {**spread(seconds), "a second": len(seconds) / (perf_counter() - start)}
    return {**found, LOAD: os.getloadavg()[0]}


def serve(cluster: Cluster, workers: int) -> None:
    """Start the API anew with another number of workers, the last word of its command."""
    name = "api-server"
    cluster.kill(name)
    replica = cluster.replicas[name]
    command = (*replica.service.command[:-1], str(workers))
    cluster.replicas[name] = replace(replica, service=replace(replica.service, command=command))
    cluster.start_again(name)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 95th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "median (ms)": 1000 * statistics.median(ordered),
        "95th percentile (ms)": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
        "calls": len(ordered),
    }


def show(title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the figures, those of operations as median and 95th percentile in milliseconds."""
    table = Table(f"{title}: median / 95th percentile, ms", *figures)
    for name in next(iter(figures.values())):
        table.add_row(name, *(_cell(column[name]) for column in figures.values()))
    Console(width=160).print(table)


def _cell(figure: Any) -> str:
    if not isinstance(figure, Mapping):
        return f"{figure:.1f}"
    rate = f", {figure['a second']:.1f}/s" if "a second" in figure else ""
    return f"{figure['median (ms)']:,.0f} / {figure['95th percentile (ms)']:,.0f}{rate}"


def _database_url(cluster: Cluster, name: str) -> URL:
    password, host = cluster.secret("postgres", "password"), cluster.replicas["postgres"].address
    return URL.create("postgresql+psycopg2", "postgres", password, host, 5432, name)


if __name__ == "__main__":
    main()
