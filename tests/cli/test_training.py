"""Training in the terminal: with a stand-in for the trainer, and with the real one on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from post_training.cli import trainer as trainer_module
from post_training.cli import training
from post_training.job_lock import locked
from post_training.schemas.trainer import CACHE_FOLDER, RESUME_FOLDER, SPEC_FILE, TrainerSpec
from tests.cli.conftest import Cli, write_request
from tests.cli.terminal import finished, paused_at, start, wait_for
from tests.mlflow_server import MLflowServer
from tests.requests_of import LORA, dpo_body, sft_body
from tests.tiny_model import write_tiny_model
from tests.waiting import wait_until

STAND_IN = """
import json, os, sys
from pathlib import Path
spec = json.loads(Path(sys.argv[1]).read_text())
assert not any(name.startswith("AIRFLOW") for name in os.environ)
print("progress step 1/1 epoch 0 loss 1.000 tokens/s 5")
result = json.loads(sys.argv[2])
if result is not None:
    Path(spec["work_dir"], "result.json").write_text(json.dumps(result))
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the trainer by one that leaves this result and exit code."""

    def replace(code: int = 0, **result: Any) -> None:
        def argv(python: str, program: str, spec: Path) -> list[str]:
            assert program == "lightning_modules.train"
            return [python, "-c", STAND_IN, str(spec), json.dumps(result or None), str(code)]

        monkeypatch.setattr(trainer_module, "worker_argv", argv)

    return replace


def spec_in(folder: Path) -> TrainerSpec:
    return TrainerSpec.model_validate_json((folder / SPEC_FILE).read_bytes())


def test_names_are_resolved_and_the_result_is_printed(
    cli: Cli, request_file: Path, data: Path, trainer: Callable[..., None]
) -> None:
    trainer(status="completed", metrics={"train_loss": 1.5})
    done = cli("run", request_file, "--json")
    assert done.exit_code == 0
    assert "progress step 1/1" in done.stderr
    found = json.loads(done.stdout)
    work_dir = data / "post_training_runs" / "lora"
    assert found == {
        "job_uuid": "lora",
        "work_dir": str(work_dir),
        "mlflow_run": None,
        "mlflow_run_id": None,
        "status": "completed",
        "error": None,
        "permanent": False,
        "diverged": False,
        "checkpoints": [],
        "metrics": {"train_loss": 1.5},
        "resources": {},
    }
    spec = spec_in(work_dir)
    assert (spec.train_data, spec.model) == (str(data / "train.jsonl"), str(data / "model"))
    assert (spec.attempt, spec.begun, spec.tracking, spec.checkpoint_dir) == (1, False, None, None)
    assert "progress step 1/1" in (work_dir / "train-1.log").read_text()


def test_a_completed_training_is_not_trained_again(
    cli: Cli, request_file: Path, data: Path, trainer: Callable[..., None]
) -> None:
    trainer(status="completed", metrics={"train_loss": 1.5})
    first = cli("run", request_file, "--work-dir", "folder")
    trainer(1, status="failed", error="it was trained again")
    again = cli("run", request_file, "--work-dir", "folder")
    assert (again.exit_code, again.stdout) == (0, first.stdout)
    assert "1.5" in again.stdout


def test_a_failure_is_told_and_tried_again_by_the_next_call(
    cli: Cli, request_file: Path, data: Path, trainer: Callable[..., None]
) -> None:
    trainer(1, status="failed", error="row 2 is bad")
    done = cli("run", request_file)
    assert done.exit_code == 1
    assert "row 2 is bad" in done.stdout
    trainer(137)
    done = cli("run", request_file)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (
        1,
        "error: The trainer ended with exit code 137 and no result.",
    )
    trainer(status="completed")
    (data / "elsewhere").mkdir()
    os.chdir(data / "elsewhere")  # where the relative names lead is known from the first call
    assert cli("run", request_file, "--work-dir", data / "post_training_runs" / "lora").exit_code == 0
    spec = spec_in(data / "post_training_runs" / "lora")
    assert (spec.attempt, spec.begun) == (3, True)
    assert spec.train_data == str(data / "train.jsonl")


def test_a_preference_request_is_trained_too(cli: Cli, data: Path, trainer: Callable[..., None]) -> None:
    trainer(status="completed")
    file = write_request(data / "dpo.yaml", dpo_body(finetuned_model="./model"))
    assert cli("run", file, "--work-dir", "dpo").exit_code == 0
    assert spec_in(data / "dpo").request.method == "preference_optimize"


@pytest.mark.parametrize(
    ("result", "code", "said"),
    [
        ({"status": "inputs_changed", "error": "The data changed."}, 4, "The data changed. Choose another"),
        ({"status": "failed", "error": "nan", "diverged": True}, 1, ""),
    ],
)
def test_what_cannot_go_on_is_a_conflict(
    cli: Cli,
    request_file: Path,
    trainer: Callable[..., None],
    result: dict[str, Any],
    code: int,
    said: str,
) -> None:
    trainer(1, **result)
    done = cli("run", request_file)
    assert done.exit_code == code
    assert said in done.stderr
    if result.get("diverged"):
        trainer(status="completed")
        done = cli("run", request_file)
        assert (done.exit_code, "has failed for good: nan" in done.stderr) == (4, True)


def test_a_folder_of_another_training_is_left_alone(
    cli: Cli, request_file: Path, data: Path, trainer: Callable[..., None]
) -> None:
    trainer(status="completed")
    assert cli("run", request_file, "--work-dir", "folder").exit_code == 0
    other = write_request(data / "other.yaml", sft_body(model="./model", training_config__n_epochs=2))
    done = cli("run", other, "--work-dir", "folder")
    assert (done.exit_code, "belongs to another request" in done.stderr) == (4, True)
    done = cli("run", request_file, "--work-dir", "folder", "--tracking-uri", "http://mlflow")
    assert (done.exit_code, "is recorded in its folder alone, not in http://mlflow" in done.stderr) == (
        4,
        True,
    )
    (data / "folder").rename(data / "moved")
    done = cli("run", request_file, "--work-dir", "moved")
    assert (done.exit_code, f"moved was {data / 'folder'}: move it back" in done.stderr) == (4, True)
    (data / "moved").rename(data / "folder")
    (data / "folder" / SPEC_FILE).write_text("{}")
    done = cli("run", request_file, "--work-dir", "folder")
    assert (done.exit_code, "spec.json is not ours" in done.stderr) == (4, True)


def test_two_never_train_in_one_folder(
    cli: Cli, request_file: Path, data: Path, trainer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOCK_SECONDS", 0.0)
    trainer(status="completed")
    with locked(data / "folder"):
        done = cli("run", request_file, "--work-dir", "folder")
    assert (done.exit_code, "another process trains in" in done.stderr) == (4, True)
    assert cli("run", request_file, "--work-dir", "folder").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training_config__n_epochs": 0}, "training_config.n_epochs: Input should be greater"),
        ({"colour": "red"}, "colour: Extra inputs"),
        (
            {"training_config__data_config__dataset_id": "no.jsonl"},
            "training_config.data_config.dataset_id: no such file: 'no.jsonl'",
        ),
        ({"model": "./no"}, "model: no such file or folder: './no'"),
        ({"model": ...}, "model: is required"),
        ({"logger_config": {"run_name": "a"}}, "logger_config.run_name: needs MLflow"),
        (
            {"training_config__efficiency_config": {"fsdp_cpu_offload": True}},
            "training_config.efficiency_config.fsdp_cpu_offload: must be false",
        ),
        (
            {
                "hyperparam_search_config": {
                    "space": {"algorithm_config.rank": {"type": "int", "low": 2, "high": 4}},
                    "n_trials": 2,
                }
            },
            "hyperparam_search_config: must be empty",
        ),
        ({"job_uuid": "a/b"}, "job_uuid: job_uuid may hold only"),
    ],
)
def test_what_is_refused_names_its_field_and_leaves_nothing(
    cli: Cli, data: Path, changes: dict[str, Any], said: str
) -> None:
    file = write_request(data / "lora.yaml", sft_body(**{"model": "./model", **changes}))
    before = sorted(data.rglob("*"))
    done = cli("run", file)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(said)
    assert sorted(data.rglob("*")) == before


def test_an_option_names_the_job(
    cli: Cli, request_file: Path, data: Path, trainer: Callable[..., None]
) -> None:
    trainer(status="completed")
    assert cli("run", request_file, "--job-uuid", "mine").exit_code == 0
    assert spec_in(data / "post_training_runs" / "mine").request.job_uuid == "mine"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def real_request(data: Path, tiny_model: Path) -> Path:
    """A job of 10 steps in two epochs on the tiny model."""
    body = sft_body(
        model=str(tiny_model),
        algorithm_config=LORA,
        training_config__n_epochs=2,
        training_config__max_steps_per_epoch=0,
        training_config__dtype="fp32",
    )
    return write_request(data / "real.yaml", body)


def steps_of(work_dir: Path) -> list[int]:
    """The steps whose loss is in the folder's record."""
    events = map(json.loads, (work_dir / "metrics.jsonl").read_text().splitlines())
    return [event["step"] for event in events if "train_loss" in event.get("values", {})]


def test_a_training_that_is_killed_goes_on(real_request: Path, data: Path) -> None:
    work_dir = data / "post_training_runs" / "job-1"
    process = start("run", real_request, trainer=paused_at(7))
    wait_for(process, (work_dir / SPEC_FILE).with_suffix(".paused").exists)
    (trainer,) = psutil.Process(process.pid).children()
    process.kill()
    finished(process, -signal.SIGKILL)
    wait_until(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE)
    out, err = finished(start("run", real_request, "--json"), 0)
    assert "attempt 2 goes on from" in err
    found = json.loads(out)
    assert (found["status"], found["work_dir"]) == ("completed", str(work_dir))
    assert [checkpoint["epoch"] for checkpoint in found["checkpoints"]] == [0, 1]
    for checkpoint in found["checkpoints"]:
        assert (Path(checkpoint["path"]) / "adapter_config.json").exists()
    assert steps_of(work_dir) == list(range(1, 11))
    assert not (work_dir / RESUME_FOLDER).exists()
    assert not (work_dir / CACHE_FOLDER).exists()


def test_ctrl_c_saves_the_state_and_the_next_call_goes_on_in_the_same_mlflow_run(
    real_request: Path, data: Path, mlflow_server: MLflowServer
) -> None:
    work_dir = data / "mine"
    command = ("run", real_request, "--work-dir", work_dir, "--tracking-uri", mlflow_server.uri)
    process = start(*command, trainer=paused_at(3))
    mark = (work_dir / SPEC_FILE).with_suffix(".paused")
    wait_for(process, mark.exists)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    mark.with_suffix(".go").touch()
    _, err = finished(process, 130)
    assert "the state is saved" in err
    assert f"The same command goes on from {work_dir}" in err
    tracking = spec_in(work_dir).tracking
    assert tracking is not None
    client = MlflowClient(mlflow_server.uri)
    assert client.get_run(tracking.run_id).info.status == "KILLED"
    out, err = finished(start(*command, "--json"), 0)
    assert "attempt 2 goes on from" in err
    found, run = json.loads(out), client.get_run(tracking.run_id)
    assert (found["mlflow_run_id"], run.info.status) == (tracking.run_id, "FINISHED")
    history = client.get_metric_history(tracking.run_id, "train_loss")
    assert [point.step for point in history] == list(range(1, 11))
    assert all(checkpoint["path"].startswith("models:/m-") for checkpoint in found["checkpoints"])
    logs = [file.path for file in client.list_artifacts(tracking.run_id, "logs")]
    assert logs == ["logs/train-1.log", "logs/train-2.log"]
