"""Jobs on the real servers, asked for with the published client."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import lightning.pytorch as pl
import llama_stack_client
import mlflow.artifacts
import mlflow.transformers
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.job import prepare_job
from lightning_modules.record import open_record
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.trainer import TrainerSpec
from post_training.standalone_layout import free_ports
from tests.system.conftest import Deployment
from tests.waiting import wait_until

pytestmark = pytest.mark.system


@dataclass(frozen=True)
class Started:
    """What was answered to those who asked for jobs.

    :param bad_rows: the job's id, as often as it was asked for.
    :param form: the id that the trigger form's job got.
    """

    bad_rows: list[str]
    form: str


@pytest.fixture(scope="module", autouse=True)
def started(deployment: Deployment) -> Started:
    """Ask for jobs that train while others are looked at."""
    data = deployment.body("x")["training_config"]["data_config"]
    body = deployment.body("bad-rows", data_config={**data, "dataset_id": str(deployment.data / "bad.jsonl")})
    client = deployment.client()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post_training.supervised_fine_tune(**body), range(16)))
    with deployment.http() as http:
        form = {"conf": form_of(deployment), "logical_date": None}
        answer = http.post("/api/v2/dags/supervised_fine_tune/dagRuns", json=form).raise_for_status()
    return Started([each.job_uuid for each in answers], str(answer.json()["dag_run_id"]))


def form_of(deployment: Deployment) -> dict[str, Any]:
    """What Airflow's trigger form sends."""
    return {
        "model": str(deployment.model),
        "training_config.data_config.dataset_id": str(deployment.data / "train.jsonl"),
        "training_config.dtype": "fp32",
        "training_config.max_steps_per_epoch": 1,
        "algorithm_config.type": None,
    }


def lora_body(deployment: Deployment, **training: Any) -> dict[str, Any]:
    """The request of a job whose record has all that it has by default."""
    return deployment.body("lora-1", **training) | {"logger_config": {}}


@pytest.fixture(scope="module")
def lora_job(deployment: Deployment) -> Any:
    """A LoRA job that has completed, and the statuses that it was seen in."""
    body = lora_body(deployment)
    client = deployment.client()
    with deployment.paused():
        assert client.post_training.supervised_fine_tune(**body).job_uuid == "lora-1"
        seen = [client.post_training.job.status(job_uuid="lora-1").status]
    seen.append(deployment.wait("lora-1", "in_progress", "completed").status)
    status = deployment.wait("lora-1")
    assert status.status == "completed", status
    return status, seen


def test_status_follows_the_job(lora_job: Any) -> None:
    status, seen = lora_job
    assert seen == ["scheduled", "in_progress"]
    now = datetime.now(UTC)
    assert status.scheduled_at <= status.started_at <= status.completed_at <= now
    assert status.resources_allocated["device"]
    assert status.resources_allocated["dtype"] == "fp32"
    assert status.resources_allocated["peak_memory_bytes"] > 0


def test_checkpoints_have_all_four_metrics(deployment: Deployment, lora_job: Any) -> None:
    artifacts = deployment.client().post_training.job.artifacts(job_uuid="lora-1")
    assert artifacts.checkpoints == lora_job[0].checkpoints
    assert [checkpoint["epoch"] for checkpoint in artifacts.checkpoints] == [0, 1]
    for checkpoint in artifacts.checkpoints:
        metrics = checkpoint["training_metrics"]
        assert set(metrics) == {"epoch", "train_loss", "validation_loss", "perplexity"}
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["validation_loss"]))
        assert checkpoint["post_training_job_id"] == "lora-1"
        assert checkpoint["path"].startswith("models:/m-")


def test_the_adapter_in_mlflow_is_the_trained_model(
    deployment: Deployment, lora_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train the same request here, and compare its model with what plain peft loads from MLflow."""

    class Keep(pl.Callback):
        model: Any = None

        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.model = pl_module.model

    spec = TrainerSpec(
        request=SupervisedFineTuneRequest.model_validate(lora_body(deployment)),
        model=str(deployment.model),
        train_data=str(deployment.data / "train.jsonl"),
        validation_data=None,
        checkpoint_dir=None,
        work_dir=tmp_path,
        attempt=1,
        tracking=None,
    )
    keep = Keep()
    prepare_job(spec, open_record(spec), [keep]).run()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", deployment.servers.mlflow_url)
    folder = mlflow.artifacts.download_artifacts(lora_job[0].checkpoints[-1]["path"])
    base = AutoModelForCausalLM.from_pretrained(deployment.model)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("How many are 7 apples?", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = keep.model.eval()(input_ids=ids).logits
        untrained = AutoModelForCausalLM.from_pretrained(deployment.model)(input_ids=ids).logits
        found = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, untrained, atol=1e-4)


def test_mlflow_serves_a_checkpoint(
    deployment: Deployment, lora_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask MLflow's own server of the newest checkpoint what MLflow's loader answers here."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", deployment.servers.mlflow_url)
    checkpoint = lora_job[0].checkpoints[-1]["path"]
    (port,) = free_ports(1)
    command = ["-m", "mlflow", "models", "serve", "--model-uri", checkpoint, "--env-manager", "local"]
    question = {
        "messages": [{"role": "user", "content": "How many are 7 apples?"}],
        "max_tokens": 5,
        "top_k": 1,
    }
    in_path = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # of uvicorn
    output = tmp_path / "serve.log"
    with output.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            stdout=log,
            stderr=log,
            env=in_path,
            start_new_session=True,
        )

    def serves() -> bool:
        assert server.poll() is None, output.read_text()
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/ping", timeout=300).is_success
        return False

    try:
        wait_until(serves)
        answered = httpx.post(f"http://127.0.0.1:{port}/invocations", json=question, timeout=300)
        answered.raise_for_status()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    (served,) = answered.json()
    chat = mlflow.transformers.load_model(checkpoint)
    (local,) = chat(question["messages"], max_new_tokens=5, top_k=1)
    assert served["choices"][0]["message"] == local["generated_text"][-1]
    assert served["usage"]["completion_tokens"] == 5


def test_the_run_in_mlflow_tells_the_whole_story(deployment: Deployment, lora_job: Any) -> None:
    (run,) = deployment.runs_of("lora-1")
    assert run.info.status == "FINISHED"
    assert run.data.params["algorithm_config.rank"] == "4"
    assert run.data.params["training_config.n_epochs"] == "2"
    assert run.data.tags["airflow.dag_id"] == "supervised_fine_tune"
    assert "/dags/supervised_fine_tune/runs/lora-1" in run.data.tags["airflow.url"]
    history = deployment.mlflow.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]
    validations = deployment.mlflow.get_metric_history(run.info.run_id, "validation_loss")
    assert sorted({point.step for point in validations}) == [0, 3, 6]
    (dataset,) = [entry.dataset for entry in run.inputs.dataset_inputs]
    assert json.loads(dataset.profile)["num_rows"] == 12
    assert dataset.digest
    files = {file.path for file in deployment.mlflow.list_artifacts(run.info.run_id)}
    assert {"request.json", "logs", "figures", "sample_answers.json"} <= files
    figures = {Path(file.path).name for file in deployment.mlflow.list_artifacts(run.info.run_id, "figures")}
    assert figures == {"loss.png", "learning_rate.png", "gradient_norm.png", "row_lengths.png"}
    assert "# lora-1, epoch 1" in run.data.tags["mlflow.note.content"]
    log = Path(deployment.mlflow.download_artifacts(run.info.run_id, "logs/train-1.log")).read_text()
    assert "progress step 6/6" in log


def test_the_run_says_that_validation_used_the_training_data(deployment: Deployment, lora_job: Any) -> None:
    (run,) = deployment.runs_of("lora-1")
    assert "no validation_dataset_id" in run.data.tags["post_training.warning"]


def test_the_task_links_to_the_run(deployment: Deployment, lora_job: Any) -> None:
    (run,) = deployment.runs_of("lora-1")
    path = "/api/v2/dags/supervised_fine_tune/dagRuns/lora-1/taskInstances/train/links"
    with deployment.http() as http:
        links = http.get(path).raise_for_status().json()["extra_links"]
    assert links["MLflow run"].endswith(f"/runs/{run.info.run_id}")


def test_every_path_family_speaks_of_the_same_job(deployment: Deployment, lora_job: Any) -> None:
    with deployment.http() as http:
        answers = [
            http.get(f"/post-training/{version}/post-training/{path}", params=params).json()
            for version in ("v1", "v1alpha")
            for path, params in (
                ("job/status", {"job_uuid": "lora-1"}),
                ("jobs/lora-1/status", {}),
            )
        ]
        listed = http.get("/post-training/v1alpha/post-training/jobs").json()
        log = http.get("/post-training/v1/post-training/job/logs", params={"job_uuid": "lora-1"}).json()
    assert all(answer == answers[0] for answer in answers)
    assert {"job_uuid": "lora-1"} in listed["data"]
    assert any("progress step" in line for line in log["log_lines"])


def test_the_same_request_again_is_the_same_job(deployment: Deployment, lora_job: Any) -> None:
    client = deployment.client()
    assert client.post_training.supervised_fine_tune(**lora_body(deployment)).job_uuid == "lora-1"
    with pytest.raises(llama_stack_client.ConflictError) as caught:
        client.post_training.supervised_fine_tune(**lora_body(deployment, n_epochs=7))
    assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(llama_stack_client.ConflictError, match="has ended: completed"):
        client.post_training.job.cancel(job_uuid="lora-1")
    assert len(deployment.runs_of("lora-1")) == 1


def test_many_submits_of_one_job_make_one(deployment: Deployment, started: Started) -> None:
    assert started.bad_rows == ["bad-rows"] * 16
    assert len(deployment.runs_of("bad-rows")) == 1


def test_bad_rows_fail_the_job_with_a_sentence_and_no_retry(deployment: Deployment) -> None:
    status = deployment.wait("bad-rows")
    assert status.status == "failed"
    assert "row 2" in status.error
    (run,) = deployment.runs_of("bad-rows")
    assert (run.info.status, run.data.tags["post_training.error"]) == ("FAILED", status.error)
    path = "/api/v2/dags/supervised_fine_tune/dagRuns/bad-rows/taskInstances/train"
    with deployment.http() as http:
        assert http.get(path).json()["try_number"] == 1


def test_the_form_starts_a_job_whose_id_is_the_runs(deployment: Deployment, started: Started) -> None:
    conf = form_of(deployment) | {"training_config.n_epochs": 0}
    with deployment.http() as http:
        refused = http.post(
            "/api/v2/dags/supervised_fine_tune/dagRuns", json={"conf": conf, "logical_date": None}
        )
    assert refused.status_code == 400
    assert "training_config.n_epochs" in refused.text
    status = deployment.wait(started.form)
    assert status.status == "completed", status
    (mlflow_run,) = deployment.runs_of(started.form)
    assert mlflow_run.data.params["trainable_parameters"] == mlflow_run.data.params["total_parameters"]
