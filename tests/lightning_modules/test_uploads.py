"""Checkpoints on their way into a run on a real MLflow server: no training waits for them but at its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from lightning_modules.mlflow_record import UPLOADS_SPOOL_FILE, open_mlflow_record
from lightning_modules.record import SPOOL_FILE, LocalRecord, open_record
from lightning_modules.spool import Spool
from lightning_modules.stored_state import StateStore
from lightning_modules.uploads import checkpoint_event
from post_training.errors import RecordUnavailableError
from post_training.schemas.jobs import PostTrainingMetric
from post_training.schemas.trainer import UPLOADED, TrainerSpec
from tests.lightning_modules.recorded import EPOCH_0, begun, models, of_epoch, points, retried
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer

NO_EPOCH = PostTrainingMetric(epoch=0, train_loss=1.5, validation_loss=None, perplexity=None)


def never() -> bool:
    return False


def impatient(spec: TrainerSpec, patience: float = 2.0) -> Any:
    """A record that waits two seconds for MLflow, and hardly at its end."""
    return open_mlflow_record(spec, spec.work_dir / SPOOL_FILE, close_timeout=0.2, patience=patience)


def paths_of(client: MlflowClient, run_id: str) -> list[str]:
    return [f"models:/{model.model_id}" for model in models(client, run_id) if model.status.value == "READY"]


def test_a_settled_checkpoint_is_ready_and_has_the_run_s_own_points(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    record = open_record(spec)
    record.log_metrics({"validation_loss": 2.0, "train_loss": 1.1}, 10)
    logged = record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    assert logged.path == folder.as_posix()
    [checkpoint] = record.settled([logged], [0], never)
    record.close()

    assert [checkpoint.path] == paths_of(client, run_id)
    assert f"{UPLOADED}{checkpoint.path}" in caplog.messages, "by it the operator learns where to lead"
    assert checkpoint.training_metrics == EPOCH_0
    [model] = models(client, run_id)
    assert {metric.key: metric.value for metric in model.metrics or []} == {
        "train_loss_epoch": EPOCH_0.train_loss,
        "validation_loss": EPOCH_0.validation_loss,
        "perplexity": EPOCH_0.perplexity,
    }
    assert points(client, run_id, "validation_loss") == [(10, 2.0)]
    assert points(client, run_id, "train_loss") == [(10, 1.1)]


def test_a_repeat_that_differs_in_the_last_digits_is_no_second_point(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    first = open_record(spec)
    first.log_metrics({"validation_loss": 2.0000001}, 10)
    first.close()
    second = begun(retried(spec))
    second.log_metrics({"validation_loss": 2.0}, 10)
    second.settled([second.log_checkpoint(folder, step=10, metrics=EPOCH_0)], [0], never)
    second.close()
    assert points(client, run_id, "validation_loss") == [(10, 2.0000001)]


def test_what_is_not_finite_is_no_metric_of_the_model(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    record = open_record(spec)
    record.settled([record.log_checkpoint(folder, step=10, metrics=NO_EPOCH)], [0], never)
    record.close()
    [model] = models(client, run_id)
    assert [metric.key for metric in model.metrics or []] == ["train_loss_epoch"]


def test_no_training_waits_for_an_upload_and_its_end_waits_for_all(
    server: MLflowServer, client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    server.stop()
    record = open_record(spec)
    started = monotonic()
    logged = [record.log_checkpoint(folder, step=10 * n, metrics=of_epoch(n)) for n in (0, 1)]
    assert monotonic() - started < 20.0
    server.start()
    settled = record.settled(logged, [0, 1], never)
    record.close()
    assert {checkpoint.path for checkpoint in settled} == set(paths_of(client, run_id))
    assert [checkpoint.epoch for checkpoint in settled] == [0, 1]


def test_an_end_that_waited_in_vain_leaves_the_uploads_to_a_later_attempt(
    server: MLflowServer, client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    server.stop()
    record = impatient(spec)
    logged = record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    started = monotonic()
    with pytest.raises(RecordUnavailableError, match="did not take its record in 2 s: another attempt"):
        record.settled([logged], [0], never)
    assert 2.0 <= monotonic() - started < 60.0
    answers = iter([True])
    with pytest.raises(RecordUnavailableError):
        record.settled([logged], [0], lambda: next(answers))
    assert next(answers, None) is None
    record.close()

    server.start()
    later = begun(retried(spec))
    [settled] = later.settled([logged], [0], never)
    later.close()
    assert [settled.path] == paths_of(client, run_id)


def test_a_checkpoint_that_was_noted_stays_where_it_is(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    record = open_record(spec)
    noted = record.note_checkpoint(folder, metrics=EPOCH_0)
    logged = record.log_checkpoint(folder, step=20, metrics=of_epoch(1))
    settled = record.settled([noted, logged], [1], never)
    record.close()
    assert settled[0] == noted
    assert [settled[1].path] == paths_of(client, run_id)


def test_a_checkpoint_that_somebody_deleted_is_uploaded_again_while_its_folder_is_there(
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = folder, Path(shutil.copytree(folder, tmp_path / "second"))
    record = open_record(spec)
    logged = [
        record.log_checkpoint(each, step=10 * n, metrics=of_epoch(n))
        for n, each in enumerate((first, second))
    ]
    before = record.settled(logged, [0, 1], never)
    record.close()
    for checkpoint in before:
        client.delete_logged_model(checkpoint.path.removeprefix("models:/"))

    later = impatient(retried(spec))
    settled = later.settled(logged, [0, 1], never)
    later.close()
    assert [checkpoint.epoch for checkpoint in settled] == [0, 1]
    assert {checkpoint.path for checkpoint in settled} == set(paths_of(client, run_id))
    assert not {checkpoint.path for checkpoint in settled} & {checkpoint.path for checkpoint in before}

    client.delete_logged_model(settled[0].path.removeprefix("models:/"))
    shutil.rmtree(first)
    last = impatient(retried(spec))
    assert last.settled(logged, [0, 1], never) == settled[1:]
    last.close()
    assert "the checkpoint of epoch 0 is neither in MLflow nor on this machine" in caplog.text


def test_a_checkpoint_that_somebody_deletes_during_its_upload_is_uploaded_again(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finalize, deleted = MlflowClient.finalize_logged_model, iter(range(1))

    def deleting(self: MlflowClient, model_id: str, status: Any) -> Any:
        if next(deleted, None) is not None:
            self.delete_logged_model(model_id)
        return finalize(self, model_id, status)

    monkeypatch.setattr(MlflowClient, "finalize_logged_model", deleting)
    record = impatient(spec)
    [checkpoint] = record.settled([record.log_checkpoint(folder, step=10, metrics=EPOCH_0)], [0], never)
    record.close()
    assert next(deleted, None) is None
    assert [checkpoint.path] == paths_of(client, run_id)


def test_a_checkpoint_that_never_arrives_is_missed(
    spec: TrainerSpec, folder: Path, monkeypatch: pytest.MonkeyPatch, client: MlflowClient
) -> None:
    def deleted(*args: Any) -> None:
        raise MlflowException("deleted by someone", RESOURCE_DOES_NOT_EXIST)

    monkeypatch.setattr(MlflowClient, "finalize_logged_model", deleted)
    record = impatient(spec)
    logged = record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    with pytest.raises(RecordUnavailableError, match="MLflow has no checkpoint of epoch 0"):
        record.settled([logged], [0], never)
    record.close()


def refuse_states(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let MLflow refuse every state; returns the names of those that it was asked to store."""
    asked: list[str] = []

    def refusing(self: StateStore, file: Path) -> str:
        asked.append(file.name)
        raise OSError("413 Request Entity Too Large")

    monkeypatch.setattr(StateStore, "upload", refusing)
    return asked


def test_a_state_that_cannot_be_stored_gives_way_to_what_waits_behind_it(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refuse_states(monkeypatch)
    record = impatient(spec)
    record.log_state(folder / "adapter.safetensors", step=5, inputs="x", must=True)
    wait_until(lambda: asked)
    record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    wait_until(lambda: paths_of(client, run_id))
    record.log_state(folder / "adapter.safetensors", step=10, inputs="x", must=True)
    wait_until(lambda: asked.count("step-10.ckpt") > 1)  # nothing waits behind it
    record.close()
    assert not list((spec.work_dir / "resume").rglob("step-5.ckpt"))


def test_a_finished_training_waits_for_no_state(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_states(monkeypatch)
    record = impatient(spec)
    logged = record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    record.log_state(folder / "adapter.safetensors", step=10, inputs="x", must=True)
    [checkpoint] = record.settled([logged], [0], never)
    record.close()
    assert [checkpoint.path] == paths_of(client, run_id)
    assert not list((spec.work_dir / "resume").rglob("step-*"))


def test_a_pruned_checkpoint_is_passed_over_and_holds_up_none(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path, tmp_path: Path
) -> None:
    pruned = Path(shutil.copytree(folder, tmp_path / "pruned"))
    spool = Spool(spec.work_dir / UPLOADS_SPOOL_FILE, run_id)
    spool.append([checkpoint_event(pruned, 10, EPOCH_0, []), {"kind": "discard", "epoch": 0}])
    shutil.rmtree(pruned)
    record = open_record(spec)
    [kept] = record.settled([record.log_checkpoint(folder, step=20, metrics=of_epoch(1))], [1], never)
    record.close()
    assert [kept.path] == paths_of(client, run_id)


def test_a_discarded_checkpoint_is_gone_and_another_stays(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    record = open_record(spec)
    first, second = (record.log_checkpoint(folder, step=10 * n, metrics=of_epoch(n)) for n in (0, 1))
    record.discard_checkpoint(first)
    [kept] = record.settled([second], [1], never)
    record.close()
    assert [kept.path] == paths_of(client, run_id)
    assert len(models(client, run_id)) == 1


def test_a_retry_finds_the_checkpoint_that_is_there(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    settled = []
    for attempt in (spec, retried(spec)):
        record = open_record(attempt)
        settled += record.settled([record.log_checkpoint(folder, step=10, metrics=EPOCH_0)], [0], never)
        record.close()
    assert settled[0] == settled[1]
    assert len(models(client, run_id)) == 1
    assert len(client.get_run(run_id).outputs.model_outputs) == 1


def test_a_store_of_artifacts_that_is_down_holds_up_no_metrics(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = [True]
    log_artifact = MlflowClient.log_model_artifact

    def failing(self: MlflowClient, *args: Any) -> None:
        if down:
            raise ConnectionError("the store is down")
        log_artifact(self, *args)

    monkeypatch.setattr(MlflowClient, "log_model_artifact", failing)
    record = open_record(spec)
    logged = record.log_checkpoint(folder, step=1, metrics=EPOCH_0)
    wait_until(lambda: models(client, run_id))
    record.log_metrics({"train_loss": 1.0}, 1)
    wait_until(lambda: points(client, run_id) == [(1, 1.0)])
    down.clear()
    [checkpoint] = record.settled([logged], [0], never)
    record.close()
    assert [checkpoint.path] == paths_of(client, run_id)


def test_a_local_record_needs_no_settling(spec: TrainerSpec, folder: Path, tmp_path: Path) -> None:
    record = LocalRecord(Spool(spec.work_dir / SPOOL_FILE, None), "job-1")
    logged = record.log_checkpoint(folder, step=1, metrics=EPOCH_0)
    assert record.settled([logged], [0], never) == [logged]
    record.log_state(tmp_path / "nothing", step=1, inputs="x", must=True)
    assert record.restore_state(tmp_path / "nothing", step=None, inputs="x", give_up=never) is None
    assert not record.superseded


def test_an_event_says_all_that_a_later_attempt_needs(folder: Path) -> None:
    event = json.loads(json.dumps(checkpoint_event(folder, 10, EPOCH_0, [])))
    assert (event["folder"], event["step"], event["points"]) == (folder.as_posix(), 10, [])
    assert PostTrainingMetric.model_validate(event["metrics"]) == EPOCH_0
