"""A client's session: submit over HTTP, follow, and show what the training changed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from llama_stack_client import ConflictError, LlamaStackClient
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from post_training.certificates import certificates
from post_training.schemas.record import METRIC_TRAIN_LOSS, METRIC_VALIDATION_LOSS, TAG_JOB_UUID
from post_training.standalone import ANSWER_SECONDS, Standalone

POLL_SECONDS = 1.0
LORA: Any = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": False,
    "rank": 8,
    "alpha": 16,
}


class JobFailedError(Exception):
    """The demo's job did not complete."""


@dataclass(frozen=True)
class Job:
    """A submitted job and the servers that know it."""

    servers: Standalone
    client: Any
    job_uuid: str

    @cached_property
    def run_id(self) -> str:
        """The id of its MLflow run."""
        found = self._mlflow("POST", "experiments/search", json={"max_results": 100})["experiments"]
        body = {
            "experiment_ids": [experiment["experiment_id"] for experiment in found],
            "filter": f"tags.`{TAG_JOB_UUID}` = '{self.job_uuid}'",
        }
        return str(self._mlflow("POST", "runs/search", json=body)["runs"][0]["info"]["run_id"])

    def cancel(self) -> None:
        """Stop the job if it has not ended."""
        with suppress(ConflictError):
            self.client.post_training.job.cancel(job_uuid=self.job_uuid)

    def run(self) -> dict[str, Any]:
        """Return its MLflow run as MLflow's REST API does."""
        return dict(self._mlflow("GET", "runs/get", params={"run_id": self.run_id})["run"])

    def history(self, metric: str) -> list[float]:
        """Return a metric's values in the order of their steps."""
        wanted = {"run_id": self.run_id, "metric_key": metric}
        found = self._mlflow("GET", "metrics/get-history", params=wanted)
        points = found.get("metrics", [])
        return [float(point["value"]) for point in sorted(points, key=lambda point: int(point["step"]))]

    def _mlflow(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        url = f"{self.servers.mlflow_url}/api/2.0/mlflow/{path}"
        answer = httpx.request(method, url, **content, timeout=ANSWER_SECONDS, verify=certificates())
        return dict(answer.raise_for_status().json())


def submit(servers: Standalone, *, model: Path, train: Path, validation: Path, steps: int) -> Job:
    """Start the demo's LoRA job.

    :param steps: optimizer steps of each epoch; 0 trains on all questions.
    """
    client = LlamaStackClient(base_url=servers.service_url, api_key=servers.token())
    job = client.post_training.supervised_fine_tune(
        job_uuid=f"demo-{datetime.now():%Y%m%d-%H%M%S}",
        model=str(model),
        training_config={
            "n_epochs": 2,
            "max_steps_per_epoch": steps,
            "gradient_accumulation_steps": 1,
            "max_validation_steps": 12,
            "data_config": {
                "dataset_id": str(train),
                "validation_dataset_id": str(validation),
                "batch_size": 4,
                "shuffle": True,
                "data_format": "instruct",
            },
            "optimizer_config": {
                "optimizer_type": "adamw",
                "lr": 1e-3,
                "weight_decay": 0.0,
                "num_warmup_steps": 10,
            },
        },
        algorithm_config=LORA,
        hyperparam_search_config={},
        logger_config={},
    )
    return Job(servers, client, job.job_uuid)


def follow(job: Job, console: Console) -> None:
    """Show a live line until the job has ended.

    :raises JobFailedError: if it did not complete.
    """
    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TextColumn("{task.fields[left]} left"),
    )
    with Progress(*columns, console=console) as progress:
        line = progress.add_task("scheduled", total=1.0, step="-", loss="-", speed="-", left="-")
        while True:
            status = job.client.post_training.job.status(job_uuid=job.job_uuid)
            progress.update(line, description=status.status, **live_fields(job.run()))
            if status.status not in ("scheduled", "in_progress"):
                break
            time.sleep(POLL_SECONDS)
    if status.status != "completed":
        raise JobFailedError(f"job {job.job_uuid} ended as {status.status}: {getattr(status, 'error', None)}")


def live_fields(run: dict[str, Any]) -> dict[str, Any]:
    """Return the live line's fields from a run's latest metrics."""
    metrics = {metric["key"]: metric for metric in run["data"].get("metrics", [])}
    steps = {param["key"]: param["value"] for param in run["data"].get("params", [])}.get("steps")
    if METRIC_TRAIN_LOSS not in metrics:
        return {}
    seconds = float(metrics["seconds_left"]["value"])
    return {
        "completed": float(metrics["progress"]["value"]),
        "step": f"{metrics[METRIC_TRAIN_LOSS]['step']}/{steps}",
        "loss": f"{float(metrics[METRIC_TRAIN_LOSS]['value']):.3f}",
        "speed": f"{float(metrics['tokens_per_second']['value']):.0f}",
        "left": f"{seconds // 60:.0f}m {seconds % 60:02.0f}s",
    }


def report(job: Job, console: Console, *, model: Path, validation: Path) -> None:
    """Print the loss and one answer before and after, and where everything is."""
    checkpoint = job.client.post_training.job.artifacts(job_uuid=job.job_uuid).checkpoints[-1]
    losses = job.history(METRIC_VALIDATION_LOSS)
    question = json.loads(validation.read_text(encoding="utf-8").partition("\n")[0])
    with console.status("Asking the model before and after"):
        before, after = answers(job.servers, model, str(checkpoint["path"]), question["question"])
    table = Table("", "before", "after")
    table.add_row("validation loss", f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
    table.add_row("a held-out question", before, after, end_section=True)
    console.print(f"\nQ: {question['question']}\n(from the docstring: {question['answer']})")
    console.print(table)
    run = job.run()
    experiment = run["info"]["experiment_id"]
    model_id = str(checkpoint["path"]).removeprefix("models:/")
    mlflow = f"{job.servers.mlflow_url}/#/experiments/{experiment}"
    dag_run = f"dags/supervised_fine_tune/runs/{job.job_uuid}"
    console.print(f"Airflow run  {job.servers.airflow_url}/{dag_run}", soft_wrap=True)
    console.print(f"MLflow run   {mlflow}/runs/{job.run_id}", soft_wrap=True)
    console.print(f"Checkpoint   {mlflow}/models/{model_id}/artifacts", soft_wrap=True)


def answers(servers: Standalone, model: Path, checkpoint: str, question: str) -> tuple[str, str]:
    """Return the base model's and the fine-tuned model's answer, from a process that ends with its memory."""
    command = [sys.executable, "-m", "demo.answer", str(model), checkpoint, question]
    environment = {"MLFLOW_TRACKING_URI": servers.mlflow_url, "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603
    before, after = json.loads(done.stdout.strip().splitlines()[-1])
    return before, after
