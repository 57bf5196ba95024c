"""Preference and quantization jobs on the real servers, one starting from the other's checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest

from post_training.schemas.record import METRIC_TRAIN_LOSS
from tests.system.conftest import Deployment

pytestmark = pytest.mark.system

PROMPTS = ["How many are 3 apples?"]


def long_form(deployment: Deployment) -> dict[str, Any]:
    """The request of a preference job in llama-stack's long form."""
    return {
        "job_uuid": "rlhf-1",
        "finetuned_model": {"uri": str(deployment.model)},
        "dataset_id": "pairs.jsonl",
        "validation_dataset_id": "pairs.jsonl",
        "algorithm": "dpo",
        "algorithm_config": {"reward_scale": 1.0, "reward_clip": 5.0, "epsilon": 0.1, "gamma": 0.9},
        "optimizer_config": {
            "optimizer_type": "sgd",
            "lr": 0.1,
            "weight_decay": 0.0,
            "num_warmup_steps": 0,
        },
        "training_config": {"n_epochs": 1, "max_steps_per_epoch": 2},
        "hyperparam_search_config": {},
        "logger_config": {},
    }


@pytest.fixture(scope="module")
def started(deployment: Deployment) -> None:
    """Ask for three jobs that train at the same time, for they need nothing of each other."""
    client = deployment.client()
    samples = {"logger_config": {"sample_prompts": PROMPTS, "run_name": "first"}}
    client.post_training.supervised_fine_tune(**deployment.body("sft-1") | samples)
    algorithm = {"type": "QAT", "quantizer_name": "8da4w-qat", "group_size": 32}
    body = deployment.body("qat-1", n_epochs=1) | {"algorithm_config": algorithm}
    client.post_training.supervised_fine_tune(**body, extra_body={"runtime": {"devices": 2}})
    with deployment.http() as http:
        for _ in range(2):  # a client's retry
            answer = http.post(
                "/post-training/v1alpha/post-training/preference-optimize", json=long_form(deployment)
            )
            assert (answer.status_code, answer.json()) == (200, {"job_uuid": "rlhf-1"})


@pytest.fixture(scope="module")
def fine_tuned(deployment: Deployment, started: None) -> str:
    """The path of a LoRA job's last checkpoint; the job answered a prompt at each validation."""
    status = deployment.wait("sft-1")
    assert status.status == "completed", status
    return str(status.checkpoints[-1]["path"])


@pytest.fixture(scope="module")
def preferred(deployment: Deployment, fine_tuned: str) -> Any:
    """A preference job that starts from that checkpoint, asked for with the published client."""
    training = deployment.body("dpo-1")["training_config"]
    training["data_config"] |= {
        "dataset_id": "pairs.jsonl",
        "validation_dataset_id": str(deployment.data / "pairs.jsonl"),
    }
    deployment.client().post_training.preference_optimize(
        job_uuid="dpo-1",
        finetuned_model=fine_tuned,
        algorithm_config={"beta": 0.5, "loss_type": "sigmoid"},  # type: ignore[typeddict-item]
        training_config=training | {"n_epochs": 3},
        hyperparam_search_config={},
        logger_config={"log_model": True},
        extra_body={"runtime": {"adapter": deployment.body("x")["algorithm_config"]}},
    )
    status = deployment.wait("dpo-1")
    assert status.status == "completed", status
    return status


ANSWER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": "How many are 7 apples?"}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(text, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=4)
print(type(model.model.layers[0].mlp.up_proj.weight).__name__, answer.shape[1])
"""


def answer(folder: str) -> list[str]:
    """Load the model with transformers in a new process: a weight's type, and the tokens after an answer."""
    command = [sys.executable, "-c", ANSWER, folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_a_preference_job_learns_and_leaves_one_merged_model(
    deployment: Deployment, preferred: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = deployment.runs_of("dpo-1")
    assert run.data.tags["post_training.method"] == "preference_optimize"
    for name in ("rewards/chosen", "rewards/rejected", "rewards/clipped_fraction", "kl"):
        assert len(deployment.mlflow.get_metric_history(run.info.run_id, name)) == 9
    margins = deployment.mlflow.get_metric_history(run.info.run_id, "validation_rewards/margins")
    assert margins[-1].value > margins[0].value
    assert run.data.metrics["validation_rewards/accuracies"] == 1
    (checkpoint,) = preferred.checkpoints  # log_model true: the last one
    assert checkpoint["epoch"] == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", deployment.servers.mlflow_url)
    folder = mlflow.artifacts.download_artifacts(checkpoint["path"])
    assert not (Path(folder) / "adapter_config.json").exists()
    assert answer(folder)[0] == "Parameter"


def test_the_long_form_starts_the_same_kind_of_job(deployment: Deployment, started: None) -> None:
    status = deployment.wait("rlhf-1")
    assert status.status == "completed", status
    (run,) = deployment.runs_of("rlhf-1")
    assert run.data.params["algorithm_config.gamma"] == "0.9"
    assert run.data.params["steps"] == "2"
    assert run.data.params["trainable_parameters"] == run.data.params["total_parameters"]


def test_a_qat_job_of_two_devices_leaves_a_quantized_model_that_answers(
    deployment: Deployment, started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = deployment.wait("qat-1")
    assert status.status == "completed", status
    (run,) = deployment.runs_of("qat-1")
    steps = deployment.mlflow.get_metric_history(run.info.run_id, METRIC_TRAIN_LOSS)
    assert [point.step for point in steps] == [1, 2, 3]  # of 4 rows each
    assert run.data.params["runtime.devices"] == "2"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", deployment.servers.mlflow_url)
    kind, length = answer(mlflow.artifacts.download_artifacts(status.checkpoints[-1]["path"]))
    assert kind.startswith("Intx")
    assert int(length) > 10


def test_sample_answers_are_a_table_of_the_run(deployment: Deployment, fine_tuned: str) -> None:
    (run,) = deployment.runs_of("sft-1")
    assert run.info.run_name == "first"
    table = json.loads(
        Path(deployment.mlflow.download_artifacts(run.info.run_id, "samples.json")).read_text()
    )
    assert table["columns"] == ["step", "prompt", "answer"]
    assert [row[:2] for row in table["data"]] == [[step, PROMPTS[0]] for step in (0, 3, 6)]
