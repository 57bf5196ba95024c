"""Real trainers that are killed, moved, superseded or cut off: they end as one that nothing happened to."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from lightning_modules.checkpoint import RESUME_FILE, readable_step
from lightning_modules.trained import TRAINED_FILE
from post_training.job_lock import claim
from post_training.schemas.record import TAG_ATTEMPT_ID
from post_training.schemas.trainer import RESULT_FILE, TrackingTarget, TrainerSpec
from tests.lightning_modules.recorded import (
    models,
    points,
    retried,
    state_files,
    stored_state,
)
from tests.lightning_modules.trainers import finish, kill, let_go, result_of, start, wait_for, wait_for_pause

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer


EPOCHS, STEPS = 3, 9
JOB: dict[str, Any] = {
    "training": {"n_epochs": EPOCHS, "gradient_accumulation_steps": 2},  # 3 steps an epoch
    "data": {"shuffle": True},
}
TIMED = {
    "tokens_per_second",
    "seconds_left",
    "device_seconds",
    "estimated_memory_bytes",
    "peak_memory_bytes",
}
OF_ALL_ATTEMPTS = {"job_tokens"}
Points = dict[str, dict[int, float]]
Start = Callable[..., Any]


@pytest.fixture
def job(make_spec: Any, dropout_model: str, server: MLflowServer, run_id: str, tmp_path: Path) -> Any:
    """Make the spec of a job of nine steps whose weights depend on the random state."""

    def make(**changes: Any) -> TrainerSpec:
        target = TrackingTarget(tracking_uri=server.uri, run_id=run_id)
        spec = {**JOB, "model": dropout_model, "tracking": target, "work_dir": tmp_path / "a", **changes}
        made: TrainerSpec = make_spec(**spec)
        return made

    return make


@pytest.fixture
def begin() -> Iterator[Start]:
    """Start trainers; none outlives the test."""
    processes = []

    def begun(spec: TrainerSpec, **options: Any) -> Any:
        processes.append(start(spec, **options))
        return processes[-1]

    yield begun
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """What the job leaves that nothing happens to; trained by the first test that asks."""
    return {}


@pytest.fixture
def undisturbed(whole: dict[str, Any], job: Any, begin: Start, tmp_path: Path) -> dict[str, Any]:
    """Weights of each epoch, and every point of every metric, of the undisturbed job."""
    if not whole:
        spec = job(tracking=None, work_dir=tmp_path / "whole")
        finish(begin(spec))
        whole["weights"] = [weights_in(spec.work_dir / "checkpoints" / f"epoch-{n}") for n in range(EPOCHS)]
        whole["points"] = spooled(spec)
        assert len(whole["points"]["train_loss"]) == STEPS
    return whole


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def spooled(spec: TrainerSpec) -> Points:
    found: Points = {}
    for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for key, value in event.get("values", {}).items():
            assert event["step"] not in found.setdefault(key, {})
            found[key][event["step"]] = math.nan if value is None else value
    return found


def assert_undisturbed(client: MlflowClient, run_id: str, undisturbed: dict[str, Any]) -> None:
    """The run holds each point once and each epoch's checkpoint once, all as if nothing had happened."""
    for key, expected in undisturbed["points"].items():
        found = points(client, run_id, key)
        assert [step for step, _ in found] == list(expected), key
        if key not in TIMED | OF_ALL_ATTEMPTS:
            assert dict(found) == expected, key
    ready = {model.name: model for model in models(client, run_id)}
    assert len(models(client, run_id)) == EPOCHS
    assert {model.status.value for model in ready.values()} == {"READY"}
    assert len(client.get_run(run_id).outputs.model_outputs) == EPOCHS
    for epoch, expected in enumerate(undisturbed["weights"]):
        model = ready[f"epoch-{epoch}"]
        stored = weights_in(Path(mlflow.artifacts.download_artifacts(f"models:/{model.model_id}")))
        assert stored.keys() == expected.keys()
        for name, weight in stored.items():
            assert torch.equal(weight, expected[name]), (epoch, name)


def wait_for_state(process: Any, client: MlflowClient, run_id: str, step: int) -> None:
    wait_for(process, lambda: (state := stored_state(client, run_id)) and state.step == step)


def test_a_job_that_is_killed_anywhere_goes_on_on_other_machines(
    client: MlflowClient,
    run_id: str,
    job: Any,
    begin: Start,
    undisturbed: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Whether the state before reached MLflow in time or not."""
    steps = sorted(random.Random().sample(range(1, STEPS + 1), 2))
    print("killed at", steps)  # so that a failure can be repeated
    for attempt, step in enumerate(steps, start=1):
        spec = job(attempt=attempt, work_dir=tmp_path / f"machine-{attempt}")
        process = begin(spec, pause_at=step)
        wait_for_pause(process, spec)
        kill(process)
        shutil.rmtree(spec.work_dir)
    last = job(attempt=3, work_dir=tmp_path / "machine-3")
    finish(begin(last))
    assert result_of(last).status == "completed"
    assert_undisturbed(client, run_id, undisturbed)


def test_a_killed_job_goes_on_on_another_machine_from_the_last_epoch_s_end_and_comes_back(
    client: MlflowClient, run_id: str, job: Any, begin: Start, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Worker A, then B, then A, whose folder holds an older state and lines that were never sent."""
    a, b = job(), job(attempt=2, work_dir=tmp_path / "b")
    first = begin(a, pause_at=4)
    wait_for_pause(first, a)
    wait_for_state(first, client, run_id, 3)
    kill(first)

    second = begin(b, pause_at=8)
    wait_for_pause(second, b)
    wait_for_state(second, client, run_id, 6)
    assert "the state at step 3 comes from the record" in kill(second)
    assert "train_loss" in spooled(b)
    assert min(spooled(b)["train_loss"]) > 3

    for cursor in a.work_dir.glob("*.cursor.json"):
        cursor.unlink()  # as if nothing had been sent
    third = retried(a, attempt=3)
    output = finish(begin(third))
    assert "the state at step 6 comes from the record" in output
    assert_undisturbed(client, run_id, undisturbed)
    announced = stored_state(
        client, run_id
    )  # that of the end, or, if it had no time to arrive, the one before
    assert announced is not None
    assert announced.step in (6, STEPS)
    assert f"step-{announced.step}.ckpt" in state_files(client, run_id)


def test_a_killed_job_goes_on_from_the_last_step_that_was_asked_for(
    make_spec: Any,
    job: Any,
    client: MlflowClient,
    run_id: str,
    begin: Start,
    undisturbed: dict[str, Any],
) -> None:
    spec = job(training={**JOB["training"]}, runtime={"save_every_n_steps": 2})
    process = begin(spec, pause_at=5)
    wait_for_pause(process, spec)
    kill(process)
    assert readable_step(spec.work_dir / RESUME_FILE) == 4
    output = finish(begin(retried(spec)))
    assert "attempt 2 goes on from" in output
    seen = undisturbed["points"]["tokens_seen"]
    assert result_of(spec).resources["tokens"] == seen[STEPS] - seen[4]
    assert_undisturbed(client, run_id, undisturbed)


def test_an_outage_over_an_epoch_s_end_and_the_training_s_costs_nothing(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    job: Any,
    begin: Start,
    undisturbed: dict[str, Any],
) -> None:
    spec = job()
    process = begin(spec, pause_at=4)
    wait_for_pause(process, spec)
    server.stop()
    let_go(spec)
    wait_for(process, (spec.work_dir / TRAINED_FILE).exists)
    server.start()
    finish(process)
    result = result_of(spec)
    assert (result.status, [checkpoint.epoch for checkpoint in result.checkpoints]) == (
        "completed",
        [0, 1, 2],
    )
    assert {c.path for c in result.checkpoints} == {f"models:/{m.model_id}" for m in models(client, run_id)}
    assert_undisturbed(client, run_id, undisturbed)


def test_after_an_outage_that_is_too_long_another_attempt_uploads_and_does_not_train(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    job: Any,
    begin: Start,
    undisturbed: dict[str, Any],
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(job().train_data, rows)
    spec = job(train_data=str(rows))
    process = begin(spec, pause_at=4, patience=2.0)
    wait_for_pause(process, spec)
    server.stop()
    let_go(spec)
    assert "torch was imported" in finish(process, code=1)
    failed = result_of(spec)
    assert failed.error is not None
    assert "did not take its record in 2 s" in failed.error
    assert (failed.status, failed.permanent) == ("failed", False)

    server.start()
    rows.unlink()
    output = finish(begin(retried(spec), pause_at=None))
    assert "without torch" in output
    assert "progress step" not in output
    assert result_of(spec).status == "completed"
    assert result_of(spec).metrics["progress"] == 1
    assert_undisturbed(client, run_id, undisturbed)


ENDLESS = {"n_epochs": 100_000, "max_validation_steps": 0}
OLDER, NEWER = "0199-a", "0199-b"


def test_the_older_of_two_trainers_stops_when_the_run_is_another_s(
    client: MlflowClient, run_id: str, job: Any, begin: Start, tmp_path: Path
) -> None:
    """On two machines: they share nothing but the run."""
    older = job(training=ENDLESS, attempt_id=OLDER, logger={"log_model": True})
    process = begin(older)
    wait_for(process, lambda: points(client, run_id))
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    output = finish(process, code=143)
    assert "a newer attempt runs" in output
    assert "Traceback" not in output
    assert not (older.work_dir / RESULT_FILE).exists()
    left = len(points(client, run_id))
    state = stored_state(client, run_id)
    assert state is None or state.step < left + 1
    assert models(client, run_id) == []


def test_the_older_of_two_trainers_stops_when_the_folder_is_another_s(
    client: MlflowClient, run_id: str, job: Any, begin: Start
) -> None:
    older = job(training=ENDLESS, attempt_id=OLDER, logger={"log_model": True})
    claim(older.work_dir, OLDER)
    process = begin(older)
    wait_for(process, lambda: points(client, run_id))
    claim(older.work_dir, NEWER)
    output = finish(process, code=143)
    assert "a newer attempt runs" in output
    assert not (older.work_dir / RESULT_FILE).exists()
    assert (older.work_dir / RESUME_FILE).exists(), "the newer one goes on from it"
    assert models(client, run_id) == []


def test_two_trainers_at_once_end_as_one(
    client: MlflowClient, run_id: str, job: Any, begin: Start, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """The older one hangs, is given up, and wakes up when the newer one has ended."""
    older = job(attempt_id=OLDER)
    process = begin(older, pause_at=4)
    wait_for_pause(process, older)
    wait_for_state(process, client, run_id, 3)
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    newer = job(attempt_id=NEWER, attempt=2, work_dir=tmp_path / "b")
    finish(begin(newer))
    assert result_of(newer).attempt_id == NEWER
    let_go(older)
    finish(process, code=143)
    assert not (older.work_dir / RESULT_FILE).exists()
    assert_undisturbed(client, run_id, undisturbed)
