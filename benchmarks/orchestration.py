"""What the orchestration costs: import, submit, first step, cancel, list and status.

``python -m benchmarks.orchestration`` starts both servers in a temporary folder, runs jobs on a tiny model
and fills Airflow and MLflow with jobs. Prints a table and writes it to a folder, with the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter, sleep, time
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Column, Table

from benchmarks.machine import machine
from benchmarks.speed_report import markdown
from post_training.schemas.record import TAG_RESOURCES
from post_training.standalone import Standalone
from tests.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
API = "/post-training/v1/post-training"
IMPORT_DAGS = """
import sys, time
from airflow.sdk import DAG
from airflow.plugins_manager import AirflowPlugin
before, start = set(sys.modules), time.perf_counter()
import post_training_plugin, runpy
for path in sys.argv[1:]:
    runpy.run_path(path)
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(seconds, ",".join(sorted(new)))
"""


def main() -> None:
    """Measure everything once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs to fill the servers with")
    parser.add_argument("--calls", type=int, default=50, help="calls behind each median")
    parser.add_argument("--cancels", type=int, default=5, help="running jobs to cancel, one by one")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where files go")
    options = parser.parse_args()
    figures: dict[str, Any] = import_cost()
    with tempfile.TemporaryDirectory() as folder:
        model, data = write_data(Path(folder))
        home = Path(folder) / "home"
        with Standalone(home, dags_folder=ROOT / "dags", allowed_roots=[data]) as servers:
            figures |= first_step(servers, model, data)
            figures |= cancels(servers, model, data, options.cancels)
            figures |= with_many_jobs(servers, model, data, options.jobs, options.calls)
    show(figures)
    write(figures, options.output)


def import_cost() -> dict[str, Any]:
    """Return the seconds that a process of Airflow spends on our plugin and DAGs, and what they import."""
    dags = sorted(str(path) for path in (ROOT / "dags").glob("*.py"))
    outputs = [
        subprocess.run(
            [sys.executable, "-c", IMPORT_DAGS, *dags], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(5)
    ]
    return {
        "import of plugin and DAGs, beyond airflow.sdk (s)": statistics.median(float(o[0]) for o in outputs),
        "packages that the import adds": outputs[0][1] if len(outputs[0]) > 1 else "",
    }


def first_step(servers: Standalone, model: Path, data: Path) -> dict[str, Any]:
    """Return the seconds from POST to the job's start, to the end of its first step, and around its training.

    The last are those of Airflow, imports, reading, MLflow and checkpoints: the same for a longer training.
    """
    with client(servers) as http:
        posted = time()
        submit(http, body("first", model, data))
        status = wait_until_ended(http, "first")
        ended = time()
    started = status["started_at"]
    mlflow = MlflowClient(servers.mlflow_url)
    experiments = [e.experiment_id for e in mlflow.search_experiments()]
    (run,) = mlflow.search_runs(experiments, "tags.`post_training.job_uuid` = 'first'")
    step = mlflow.get_metric_history(run.info.run_id, "train_loss")[0].timestamp / 1000
    around = ended - posted - json.loads(run.data.tags[TAG_RESOURCES])["seconds"]
    return {
        "POST to the task's start (s)": _seconds(started) - posted,
        "POST to the end of the first step (s)": step - posted,
        "POST to completed, but for the training itself (s)": around,
        "the same as a share of a ten-minute training (%)": 100 * around / 600,
    }


def cancels(servers: Standalone, model: Path, data: Path, count: int) -> dict[str, Any]:
    """Return the seconds from a cancel to the end of the last process of the job, which is training."""
    seconds = []
    with client(servers) as http:
        for number in range(count):
            job_uuid = f"cancelled-{number}"
            request = body(job_uuid, model, data)
            request["training_config"] |= {"n_epochs": 100_000}
            submit(http, request)
            progress = servers.layout.home / f"jobs/jobs/supervised_fine_tune/{job_uuid}/train/metrics.jsonl"
            while not (progress.exists() and "train_loss" in progress.read_text()):
                sleep(0.1)
            trainer = next(
                process
                for process in psutil.process_iter(["cmdline"])
                if any(f"/{job_uuid}/train/spec.json" in part for part in process.info["cmdline"] or ())
            )
            processes = [trainer, *trainer.children(recursive=True), *trainer.parents()[:1]]
            start = perf_counter()
            http.post(f"{API}/jobs/{job_uuid}/cancel").raise_for_status()
            psutil.wait_procs(processes)
            seconds.append(perf_counter() - start)
    return {
        "cancel to the end of the job's processes, median (s)": statistics.median(seconds),
        "cancel to the end of the job's processes, slowest (s)": max(seconds),
    }


def _seconds(iso: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(iso).timestamp()


def with_many_jobs(servers: Standalone, model: Path, data: Path, jobs: int, calls: int) -> dict[str, Any]:
    """Submit many jobs to a paused DAG, then time list and status."""
    with client(servers) as http:
        http.patch("/api/v2/dags/supervised_fine_tune", json={"is_paused": True}).raise_for_status()
        start = perf_counter()
        with ThreadPoolExecutor(4) as pool:
            seconds = list(
                pool.map(lambda i: timed(lambda: submit(http, body(f"many-{i}", model, data))), range(jobs))
            )
        total = perf_counter() - start
        listed = [timed(lambda: http.get(f"{API}/jobs").raise_for_status()) for _ in range(calls)]
        asked = [f"many-{i * jobs // calls}" for i in range(calls)]
        read = [timed(partial(read_status, http, job_uuid)) for job_uuid in asked]
        found = len(http.get(f"{API}/jobs").json()["data"])
    return {
        "jobs in Airflow and MLflow": found,
        "submits a second, four at once": jobs / total,
        **_spread("submit, four at once", seconds),
        **_spread("GET jobs", listed),
        **_spread("GET job/status", read),
    }


def _spread(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"{name}, median (ms)": 1000 * statistics.median(ordered),
        f"{name}, 95th percentile (ms)": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
    }


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = perf_counter()
    call()
    return perf_counter() - start


def client(servers: Standalone) -> httpx.Client:
    """Return an HTTP client that is logged in."""
    headers = {"Authorization": f"Bearer {servers.token()}"}
    return httpx.Client(base_url=servers.airflow_url, headers=headers, timeout=120)


def submit(http: httpx.Client, request: dict[str, Any]) -> None:
    """Start a job."""
    http.post(f"{API}/supervised-fine-tune", json=request).raise_for_status()


def read_status(http: httpx.Client, job_uuid: str) -> dict[str, Any]:
    """Return a job's status."""
    answer = http.get(f"{API}/job/status", params={"job_uuid": job_uuid}).raise_for_status()
    status: dict[str, Any] = answer.json()
    return status


def wait_until_ended(http: httpx.Client, job_uuid: str) -> dict[str, Any]:
    """Return the status of a completed job."""
    while True:
        status = read_status(http, job_uuid)
        if status["status"] not in ("scheduled", "in_progress"):
            assert status["status"] == "completed", status
            return status
        sleep(0.2)


def body(job_uuid: str, model: Path, data: Path) -> dict[str, Any]:
    """Return a small LoRA request."""
    return {
        "job_uuid": job_uuid,
        "model": str(model),
        "training_config": {
            "n_epochs": 1,
            "max_steps_per_epoch": 4,
            "max_validation_steps": 0,
            "data_config": {
                "dataset_id": str(data / "train.jsonl"),
                "batch_size": 8,
                "shuffle": True,
                "data_format": "instruct",
            },
        },
        "algorithm_config": {
            "type": "LoRA",
            "lora_attn_modules": ["q_proj", "v_proj"],
            "apply_lora_to_mlp": False,
            "apply_lora_to_output": False,
            "rank": 8,
            "alpha": 16,
        },
        "hyperparam_search_config": {},
        "logger_config": {},
    }


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write rows to train on, and a tiny model beside them; return the model's folder and the data's."""
    data = folder / "data"
    data.mkdir()
    rows = [{"question": f"How many are {i}?", "answer": f"There are {i}."} for i in range(64)]
    (data / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return write_tiny_model(data / "tiny-llama"), data


def show(figures: dict[str, Any]) -> None:
    """Print the figures."""
    table = Table("figure", Column("value", overflow="fold"))
    for line in lines_of(figures):
        table.add_row(*line)
    Console().print(table)


def lines_of(figures: dict[str, Any]) -> list[list[str]]:
    """Return names and values as they are read."""
    return [
        [name, f"{value:.3f}" if isinstance(value, float) else str(value)] for name, value in figures.items()
    ]


def write(figures: dict[str, Any], folder: Path) -> None:
    """Write ``orchestration.md`` and ``orchestration.json``."""
    where = machine()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orchestration.json").write_text(json.dumps({"machine": where, "figures": figures}, indent=1))
    heading = f"Measured on {where['date']}, {where['device']}; SQLite, a tiny model.\n\n"
    (folder / "orchestration.md").write_text(heading + markdown(["", ""], lines_of(figures)) + "\n")


if __name__ == "__main__":
    main()
