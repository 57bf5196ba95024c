"""What many clients at once do to the HTTP API: submits of distinct jobs, of one job, and polls of a status.

``python -m benchmarks.load`` starts both servers in a temporary folder and pauses the DAGs, so that nothing
trains. Prints a table; ``--json FILE`` keeps the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
from mlflow import MlflowClient
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed

from benchmarks.orchestration import API, ROOT, body, show
from post_training.schemas.record import TAG_JOB_UUID, TAG_METHOD
from post_training.standalone import DAG_IDS, Standalone
from tests.tiny_model import write_tiny_model

TIMEOUT_SECONDS = 60.0
TRIES = 3
"""Both of the published client."""
SUBMIT = f"{API}/supervised-fine-tune"
Call = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


@dataclass(frozen=True)
class Answer:
    """What one call got in the end: the HTTP status, or the name of the client's error; seconds and tries."""

    status: int | str
    seconds: float
    tries: int


@dataclass(frozen=True)
class Jobs:
    """What both servers hold."""

    dag_runs: Counter[str]
    """Airflow's DAG runs by id."""
    mlflow_runs: Counter[str]
    """MLflow's active runs by job_uuid, those that were begun and not finished too."""


def main() -> None:
    """Measure everything once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("--submits", type=int, default=500, help="submits at once, of each kind")
    parser.add_argument("--clients", type=int, default=200, help="clients that poll")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long they poll")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        (data / "train.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "4"}) + "\n")
        model = write_tiny_model(data / "tiny-llama")
        home = Path(folder) / "home"
        with Standalone(home, dags_folder=ROOT / "dags", allowed_roots=[data]) as servers:
            pause(servers)
            bodies = [body(f"distinct-{i}", model, data) for i in range(options.submits)]
            figures = timed("distinct submits", submit_at_once(servers, bodies))
            figures |= timed(
                "same submits", submit_at_once(servers, [body("same", model, data)] * len(bodies))
            )
            held = jobs(servers)
            figures |= {
                "jobs that must be there": len(bodies) + 1,
                "DAG runs": held.dag_runs.total(),
                "MLflow runs": held.mlflow_runs.total(),
                "jobs with one MLflow run": sum(count == 1 for count in held.mlflow_runs.values()),
            }
            polls = poll(servers, [f"distinct-{i}" for i in range(options.clients)], options.seconds)
            figures |= timed("polls", polls)
            figures["polls a second"] = len(polls) / options.seconds
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def pause(servers: Standalone, *, paused: bool = True) -> None:
    """Keep the request DAGs from running what is submitted, or let them again."""
    headers = {"Authorization": f"Bearer {servers.token()}"}
    with httpx.Client(base_url=servers.airflow_url, headers=headers, timeout=120) as http:
        for dag_id in DAG_IDS:
            done(http, "PATCH", f"/api/v2/dags/{dag_id}", json={"is_paused": paused})


@retry(
    retry=retry_if_exception_type(httpx.HTTPError),
    wait=wait_fixed(1),
    stop=stop_after_delay(60),
    reraise=True,
)
def done(http: httpx.Client, method: str, url: str, **request: Any) -> None:
    """Have Airflow's own API do what may be asked twice, again while SQLite is locked by many clients.

    What is to be deleted and is gone was deleted by the request before.

    :raises httpx.HTTPError: when it is not done within a minute.
    """
    answer = http.request(method, url, **request)
    if not (method == "DELETE" and answer.status_code == 404):
        answer.raise_for_status()


def submit_at_once(servers: Standalone, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Send every body at the same time; who is told to come again does so, as the published client does."""

    def sending(request: dict[str, Any]) -> Call:
        return lambda http: http.post(SUBMIT, json=request)

    async def send() -> list[Answer]:
        async with _client(servers) as http:
            return await asyncio.gather(*(_answer(http, sending(request)) for request in bodies))

    return asyncio.run(send())


def poll(servers: Standalone, job_uuids: Sequence[str], seconds: float) -> list[Answer]:
    """Let one client for each id ask for its status, again as soon as it is answered."""

    async def client(http: httpx.AsyncClient, job_uuid: str, end: float) -> list[Answer]:
        params, answers = {"job_uuid": job_uuid}, []
        while perf_counter() < end:
            answers.append(await _answer(http, lambda http: http.get(f"{API}/job/status", params=params)))
        return answers

    async def send() -> list[Answer]:
        async with _client(servers) as http:
            end = perf_counter() + seconds
            each = await asyncio.gather(*(client(http, job_uuid, end) for job_uuid in job_uuids))
            return [answer for answers in each for answer in answers]

    return asyncio.run(send())


def _client(servers: Standalone) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {servers.token()}"}
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(
        base_url=servers.airflow_url, headers=headers, timeout=TIMEOUT_SECONDS, limits=limits
    )


async def _answer(http: httpx.AsyncClient, call: Call) -> Answer:
    start, tries = perf_counter(), 1
    try:
        while (answer := await call(http)).status_code == 503 and tries < TRIES:
            await asyncio.sleep(float(answer.headers["retry-after"]))
            tries += 1
        status: int | str = answer.status_code
    except httpx.HTTPError as error:
        status = type(error).__name__
    return Answer(status, perf_counter() - start, tries)


def jobs(servers: Standalone) -> Jobs:
    """Count what both servers hold."""
    headers = {"Authorization": f"Bearer {servers.token()}"}
    with httpx.Client(base_url=servers.airflow_url, headers=headers, timeout=60) as http:
        runs = Counter(run_id for dag_id in DAG_IDS for run_id in _dag_runs(http, dag_id))
    return Jobs(runs, Counter(_mlflow_jobs(MlflowClient(servers.mlflow_url))))


def _dag_runs(http: httpx.Client, dag_id: str) -> Iterable[str]:
    found: list[str] = []
    while True:
        params = {"limit": 100, "offset": len(found)}
        page = http.get(f"/api/v2/dags/{dag_id}/dagRuns", params=params).raise_for_status().json()
        found += [run["dag_run_id"] for run in page["dag_runs"]]
        if not page["dag_runs"]:
            return found


def _mlflow_jobs(mlflow: MlflowClient) -> Iterable[str]:
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    token: str | None = None
    while True:
        page = mlflow.search_runs(experiments, max_results=1000, page_token=token)
        ours = [run.data.tags for run in page if TAG_METHOD in run.data.tags]
        yield from (tags.get(TAG_JOB_UUID, "of no job") for tags in ours)
        token = page.token
        if not token:
            return


def timed(name: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how often each status was answered, and how fast."""
    ordered = sorted(answer.seconds for answer in answers)
    statuses = Counter(str(answer.status) for answer in answers)
    return {
        **{f"{name}: {status}": count for status, count in sorted(statuses.items())},
        f"{name}: at the first try": sum(answer.tries == 1 for answer in answers),
        f"{name}, median (ms)": 1000 * ordered[len(ordered) // 2],
        f"{name}, 95th percentile (ms)": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
        f"{name}, slowest (ms)": 1000 * ordered[-1],
    }


if __name__ == "__main__":
    main()
