"""One run of the harness: servers, undisturbed references, disturbed jobs, and what came of them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from rich.console import Console

from post_training.standalone import Standalone
from tests.chaos.checks import OF_TASK_STATE, Ended
from tests.chaos.client import ENDED, Client
from tests.chaos.killer import Killer
from tests.chaos.processes import of_home, running_jobs
from tests.chaos.records import Records, Trained
from tests.chaos.strikes import STRIKES, draw
from tests.chaos.workload import KINDS, Workload

ROOT = Path(__file__).parents[2]
SETTLE_SECONDS = 15.0
"""Time after the last end in which whoever still writes or starts something shows itself."""

# Kills use up retries; what is tested is what happens while there are some left.
TASK_POLICY = """
from datetime import timedelta

def task_policy(task):
    task.retries = 30
    task.retry_delay = timedelta(seconds=2)
"""


@dataclass(frozen=True)
class Options:
    """What the run is asked for; the same options choose the same strikes, cancels and jobs.

    :param every: mean seconds between two strikes.
    :param cancelled: share of the jobs that are cancelled at some moment.
    :param steps: optimizer steps of an epoch.
    :param job_timeout: seconds in which each job must end.
    :param missed_after: seconds without a heartbeat after which Airflow starts a task again.
    :param only: which strikes there may be.
    """

    jobs: int
    kills: int
    seed: int
    parallel: int
    every: float = 15.0
    cancelled: float = 0.1
    steps: int = 40
    job_timeout: float = 1800.0
    missed_after: int = 60
    only: tuple[str, ...] = tuple(STRIKES)

    @property
    def at_once(self) -> int:
        """Jobs that have not ended at the same time: some of them wait for a slot."""
        return self.parallel + 2

    def strikes_due(self, number: int) -> int:
        """Return how many strikes a job waits for before it starts: all of them, for the last one."""
        return max(number - self.at_once + 2, 0) * self.kills // self._shares

    def strikes_allowed(self, ended: int) -> int:
        """Return how many strikes there may be once so many jobs have ended; at least what one waits for."""
        return -(-(ended + 2) * self.kills // self._shares)

    @property
    def _shares(self) -> int:
        return max(self.jobs - self.at_once + 1, 1)


@dataclass(frozen=True)
class Job:
    """A job as the seed chose it.

    :param cancel_after: seconds from its submit to its cancel; None is never.
    """

    job_uuid: str
    kind: str
    cancel_after: float | None


@dataclass(frozen=True)
class End:
    """In which status a job was first seen ended, and whether its cancel was accepted."""

    status: str
    cancel_accepted: bool


@dataclass(frozen=True)
class Outcome:
    """What the run came to."""

    jobs: list[Ended]
    killer: Killer
    left_running: int
    unfinished_runs: int
    seconds: float


def choose(options: Options) -> list[Job]:
    """Choose kinds and cancels."""
    rng = random.Random(f"jobs {options.seed}")
    ids = range(options.jobs)
    cancelled = set(rng.sample(ids, round(options.jobs * options.cancelled)))
    return [
        Job(f"chaos-{i:03}", list(KINDS)[i % len(KINDS)], rng.uniform(0, 60) if i in cancelled else None)
        for i in ids
    ]


def run(options: Options, home: Path, console: Console) -> Outcome:
    """Run everything below ``home``."""
    started = monotonic()
    home = home.resolve()
    workload = Workload(home / "data", options.steps)
    workload.write()
    with servers_of(home, workload, options) as servers:
        client, records = Client(servers), Records(servers.mlflow_url)
        with console.status("Training each kind of job undisturbed"):
            references = train_references(client, records, workload, options)
        rng = random.Random(f"strikes {options.seed}")
        choices = draw(rng, 2 * options.kills, every=options.every, names=options.only)
        killer = Killer(servers, choices, options.kills, options.strikes_allowed, console)
        ends = disturb(client, killer, workload, options)
        servers.wait_until_ready()
        for job, _ in ends:
            wait_for_task(client, job, monotonic() + options.job_timeout)
        sleep(SETTLE_SECONDS)
        jobs = [look_at(client, records, home, job, end, references) for job, end in ends]
        unfinished = sum(run.info.status in ("SCHEDULED", "RUNNING") for run in records.runs())
    return Outcome(jobs, killer, len(of_home(home)), unfinished, monotonic() - started)


@contextmanager
def servers_of(home: Path, workload: Workload, options: Options) -> Iterator[Standalone]:
    """Start servers with many quick retries and one thread for each trainer."""
    policy = home / "airflow" / "config" / "airflow_local_settings.py"
    policy.parent.mkdir(parents=True)
    policy.write_text(TASK_POLICY)
    environment = {
        "OMP_NUM_THREADS": "1",
        "AIRFLOW__CORE__PARALLELISM": str(options.parallel),
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": str(options.missed_after),
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",  # the DAGs stay as they are
    }
    servers = Standalone(
        home,
        dags_folder=ROOT / "dags",
        allowed_roots=[workload.folder],
        extra_env=environment,
        timeout=1200,
    )
    with servers:
        yield servers


def train_references(
    client: Client, records: Records, workload: Workload, options: Options
) -> dict[str, Trained]:
    """Train each kind once while nothing is struck."""
    for kind in KINDS:
        client.submit(kind, workload.body(kind, f"reference-{kind}"))
    found = {}
    for kind in KINDS:
        job_uuid = f"reference-{kind}"
        status = wait_for_end(client, job_uuid, monotonic() + options.job_timeout)
        assert status["status"] == "completed", status
        (run,) = [run for run in records.runs() if run.info.run_name == job_uuid]
        found[kind] = records.trained(run, status["checkpoints"][-1]["path"])
        steps = [step for step, _ in found[kind].series["train_loss"]]
        assert steps == list(range(1, KINDS[kind].epochs * workload.steps + 1)), steps
    return found


def disturb(client: Client, killer: Killer, workload: Workload, options: Options) -> list[tuple[Job, End]]:
    """Run all jobs while the killer strikes; return each with its end."""
    striking = threading.Thread(target=killer.run, name="killer")
    striking.start()

    def follow(number: int, job: Job) -> End:
        pace(killer, number, options)
        killer.job_begins(job.job_uuid)
        client.submit(job.kind, workload.body(job.kind, job.job_uuid))
        cancelled = False
        if job.cancel_after is not None:
            sleep(job.cancel_after)
            cancelled = client.cancel(job.job_uuid)
        status = wait_for_end(client, job.job_uuid, monotonic() + options.job_timeout)
        killer.job_ended(job.job_uuid)
        return End(status["status"], cancelled)

    jobs = choose(options)
    with ThreadPoolExecutor(options.at_once) as pool:
        ends = list(zip(jobs, pool.map(follow, range(len(jobs)), jobs), strict=True))
    killer.halt()
    striking.join()
    killer.wait_for_recoveries(options.job_timeout)
    return ends


def pace(killer: Killer, number: int, options: Options) -> None:
    """Hold a job back until its share of the strikes is done."""
    while len(killer.done) < options.strikes_due(number) and not killer.finished:
        sleep(0.5)


def wait_for_end(client: Client, job_uuid: str, deadline: float) -> dict[str, Any]:
    """Return the job's status once it has ended, or when time is up."""
    while True:
        status = client.status(job_uuid)
        if status["status"] in ENDED or monotonic() > deadline:
            return status
        sleep(1.0)


def wait_for_task(client: Client, job: Job, deadline: float) -> None:
    """Wait until a job's task has ended, which it may do after its record, or until time is up."""
    while client.task(job.kind, job.job_uuid)["state"] not in OF_TASK_STATE and monotonic() < deadline:
        sleep(1.0)


def look_at(
    client: Client,
    records: Records,
    home: Path,
    job: Job,
    end: End,
    references: dict[str, Trained],
) -> Ended:
    """Collect all that is known of a job."""
    status = client.status(job.job_uuid)
    # A run that another one supersedes keeps this name: nothing of the inputs changes here.
    runs = [run for run in records.runs() if run.info.run_name == job.job_uuid]
    models = [model for run in runs for model in records.checkpoints(run)]
    completed = status["status"] == "completed" and len(runs) == 1
    return Ended(
        job_uuid=job.job_uuid,
        kind=job.kind,
        status=status,
        first_end=end.status,
        cancel_accepted=end.cancel_accepted,
        task=client.task(job.kind, job.job_uuid),
        mlflow=[(run.info.status, run.info.lifecycle_stage == "active") for run in runs],
        models=[(int(model.params["step"]), str(model.status.value)) for model in models],
        trained=records.trained(runs[0], status["checkpoints"][-1]["path"]) if completed else None,
        reference=references[job.kind],
        epochs=KINDS[job.kind].epochs,
        processes=int(job.job_uuid in running_jobs(home)),
    )
