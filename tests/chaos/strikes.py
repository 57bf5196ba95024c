"""What may happen to a deployment: each strike kills or stops something, and says how it comes back."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psutil

from post_training.certificates import certificates
from post_training.standalone import SERVERS_FILE, Standalone
from post_training.standalone_layout import AIRFLOW_SERVERS
from tests.chaos.processes import idle_orphans, of_home, running_jobs
from tests.chaos.progress import progress_after, trains
from tests.waiting import answers

PROCESSES_OF_A_JOB = ("trainer", "task", "supervisor")
_MLFLOW = "mlflow"


@dataclass(frozen=True)
class Choice:
    """One strike as the seed chose it.

    :param pause: seconds since the one before.
    :param pick: which of the running jobs, as a fraction of their number.
    :param training: whether only jobs that have trained a step count, and not those that start.
    :param back_after: seconds until what was struck is started again.
    :param outage: seconds that an outage of MLflow lasts.
    :param session: whether what a scheduler has started dies with it.
    """

    strike: str
    pause: float
    pick: float
    training: bool
    back_after: float
    outage: float
    session: bool


@dataclass(frozen=True)
class Struck:
    """What a strike did.

    :param servers: that are down until ``restart``.
    :param restart: brings them back; None where Airflow does.
    :param after: seconds until then.
    :param recovered: of each job and server that must come back, by its name, whether it is back.
    """

    recovered: dict[str, Callable[[], bool]]
    servers: tuple[str, ...] = ()
    restart: Callable[[], None] | None = None
    after: float = 0.0
    jobs: list[str] = field(default_factory=list)


def strike_job(servers: Standalone, choice: Choice) -> Struck | None:
    """Kill one process of one running job; None where there is none."""
    home = servers.layout.home
    chains = [
        (job, chain)
        for job, chain in sorted(running_jobs(home).items())
        if getattr(chain, choice.strike) is not None and (not choice.training or trains(home, job))
    ]
    if not chains:
        return None
    job, chain = chains[int(choice.pick * len(chains))]
    recovered = progress_after(home, job)
    kill_all([getattr(chain, choice.strike)])
    return Struck({job: recovered}, jobs=[job])


def strike_scheduler(servers: Standalone, choice: Choice) -> Struck:
    """Kill the scheduler, alone or with its tasks."""
    home = servers.layout.home
    jobs = sorted(running_jobs(home)) if choice.session else []
    recovered = {job: progress_after(home, job) for job in jobs}
    killed_at = datetime.now(UTC)
    servers.kill_server("scheduler", session=choice.session)

    def restart() -> None:
        kill_all(idle_orphans(home))
        servers.start_server("scheduler")

    return Struck(
        recovered | {"scheduler": lambda: scheduler_beats(servers, killed_at)},
        ("scheduler",),
        restart,
        choice.back_after,
        jobs,
    )


def strike_api_server(servers: Standalone, choice: Choice) -> Struck:
    """Kill the api-server, through which tasks and clients speak."""
    servers.kill_server("api-server", session=True)
    url = f"{servers.airflow_url}/api/v2/version"
    back = {"api-server": lambda: answers(url)}
    return Struck(back, ("api-server",), lambda: servers.start_server("api-server"), choice.back_after)


def strike_mlflow(servers: Standalone, choice: Choice) -> Struck:
    """Kill MLflow and start it again at once."""
    return _mlflow_down(servers, choice.back_after)


def take_mlflow_down(servers: Standalone, choice: Choice) -> Struck:
    """Kill MLflow and leave it down for the outage."""
    return _mlflow_down(servers, choice.outage)


def stop_mlflow(servers: Standalone, choice: Choice) -> Struck:
    """Let MLflow accept requests and answer none for the outage."""
    pids = [process.pid for process in server_processes(servers.layout.home, _MLFLOW)]
    send_all(pids, signal.SIGSTOP)
    url = f"{servers.mlflow_url}/health"
    return Struck(
        {_MLFLOW: lambda: answers(url)}, (_MLFLOW,), lambda: send_all(pids, signal.SIGCONT), choice.outage
    )


def strike_airflow(servers: Standalone, choice: Choice) -> Struck:
    """Kill all of Airflow's servers and tasks, as when its machine dies."""
    home = servers.layout.home
    jobs = sorted(running_jobs(home))
    recovered = {job: progress_after(home, job) for job in jobs}
    killed_at = datetime.now(UTC)
    for name in AIRFLOW_SERVERS:
        servers.kill_server(name, session=True)
    mlflow = {process.pid for process in server_processes(home, _MLFLOW)}
    kill_all([process for process in of_home(home) if process.pid not in mlflow | {os.getpid()}])

    def restart() -> None:
        for name in AIRFLOW_SERVERS:
            servers.start_server(name)

    recovered["scheduler"] = lambda: scheduler_beats(servers, killed_at)
    return Struck(recovered, AIRFLOW_SERVERS, restart, choice.back_after, jobs)


STRIKES: dict[str, tuple[int, tuple[str, ...], Callable[[Standalone, Choice], Struck | None]]] = {
    "trainer": (26, (), strike_job),
    "task": (14, (), strike_job),
    "supervisor": (10, (), strike_job),
    "scheduler": (12, ("scheduler",), strike_scheduler),
    "api-server": (12, ("api-server",), strike_api_server),
    "mlflow": (10, (_MLFLOW,), strike_mlflow),
    "mlflow down": (5, (_MLFLOW,), take_mlflow_down),
    "mlflow stopped": (5, (_MLFLOW,), stop_mlflow),
    "airflow": (6, AIRFLOW_SERVERS, strike_airflow),
}
"""By name: its weight in the draw, the servers that must be up for it, and what it does."""


def draw(rng: random.Random, count: int, *, every: float, names: Sequence[str]) -> list[Choice]:
    """Draw the strikes of a run; each name comes before any comes twice, if there is room.

    :param every: mean seconds between two.
    :param names: which of ``STRIKES``.
    """
    weights = [STRIKES[name][0] for name in names]
    drawn = rng.sample(names, min(count, len(names)))
    drawn += rng.choices(names, weights, k=count - len(drawn))
    return [
        Choice(
            name,
            pause=rng.uniform(0.3, 1.7) * every,
            pick=rng.random(),
            training=rng.random() < 0.8,
            back_after=rng.uniform(0, 5),
            outage=rng.uniform(20, 60),
            session=rng.random() < 0.5,
        )
        for name in drawn
    ]


def server_processes(home: Path, name: str) -> list[psutil.Process]:
    """The living processes of a server's newest session."""
    leader = json.loads((home / SERVERS_FILE).read_text())["sessions"][name][-1]["pid"]
    return [process for process in of_home(home) if session_of(process) == leader]


def session_of(process: psutil.Process) -> int | None:
    """The process's session; None once it has ended."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def kill_all(processes: list[psutil.Process]) -> None:
    """Send SIGKILL to each that lives."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def send_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each that lives."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def scheduler_beats(servers: Standalone, since: datetime) -> bool:
    """Whether a scheduler has sent a heartbeat since then."""
    try:
        url = f"{servers.airflow_url}/api/v2/monitor/health"
        health = httpx.get(url, timeout=2, verify=certificates()).json()
    except (httpx.HTTPError, ValueError):
        return False
    beat = health["scheduler"]["latest_scheduler_heartbeat"]
    return beat is not None and datetime.fromisoformat(beat) > since


def _mlflow_down(servers: Standalone, seconds: float) -> Struck:
    servers.kill_server(_MLFLOW, session=True)
    return _mlflow_out(servers, lambda: servers.start_server(_MLFLOW), seconds)


def _mlflow_out(servers: Standalone, restart: Callable[[], None], seconds: float) -> Struck:
    url = f"{servers.mlflow_url}/health"
    return Struck({_MLFLOW: lambda: answers(url)}, (_MLFLOW,), restart, seconds)
