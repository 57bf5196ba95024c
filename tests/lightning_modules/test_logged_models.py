"""Checkpoints as models of a run on a real MLflow server: whole or not at all, and one for each epoch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pytest
from mlflow import MlflowClient

from lightning_modules.logged_models import LoggedModels, Point
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric
from post_training.schemas.record import TAG_CHECKPOINT, TAG_JOB_UUID
from tests.lightning_modules.recorded import EPOCH_0, model_files, models, of_epoch, points

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer

FILES = [f"weights-{number}.bin" for number in range(5)]


class CutClient(MlflowClient):
    """A real client that calls a function before it sends a file, and remembers what it was asked to send."""

    def __init__(self, uri: str, *, at: int, cut: Any) -> None:
        super().__init__(uri)
        self.sent: list[str] = []
        self._at = at
        self._cut = cut

    def log_model_artifact(self, model_id: str, local_path: str, artifact_path: str | None = None) -> None:
        self.sent.append(Path(local_path).name)
        if len(self.sent) == self._at:
            self._cut()
        super().log_model_artifact(model_id, local_path, artifact_path)


@pytest.fixture
def logged(client: MlflowClient, run_id: str) -> LoggedModels:
    return LoggedModels(client, run_id, "job-1")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint of five files."""
    made = tmp_path / "shards"
    made.mkdir()
    for name in FILES:
        (made / name).write_text(name)
    return made


def published(logged: LoggedModels, folder: Path, epoch: int = 0) -> Checkpoint:
    values = [Point("train_loss_epoch", 1.5, None), Point("validation_loss", 2.0, None)]
    return logged.publish(folder, step=10, metrics=of_epoch(epoch), points=values)


def test_a_checkpoint_is_ready_with_its_metrics_and_comes_back_byte_for_byte(
    client: MlflowClient, run_id: str, logged: LoggedModels, folder: Path
) -> None:
    checkpoint = published(logged, folder)
    [model] = models(client, run_id)
    assert checkpoint.path == f"models:/{model.model_id}"
    assert (checkpoint.identifier, checkpoint.epoch, checkpoint.post_training_job_id) == (
        "job-1-epoch-0",
        0,
        "job-1",
    )
    assert checkpoint.created_at.utcoffset() is not None
    assert checkpoint.training_metrics == EPOCH_0
    assert (model.name, model.status.value, model.tags[TAG_JOB_UUID]) == ("epoch-0", "READY", "job-1")
    assert PostTrainingMetric.model_validate_json(model.tags[TAG_CHECKPOINT]) == EPOCH_0
    values = {metric.key: metric.value for metric in model.metrics or []}
    assert values == {"train_loss_epoch": 1.5, "validation_loss": 2.0}
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(model.model_id, 10)]

    copy = Path(mlflow.artifacts.download_artifacts(checkpoint.path))
    for file in ("adapter.safetensors", "tokenizer/vocab.json"):
        assert (copy / file).read_bytes() == (folder / file).read_bytes()


def test_what_the_run_has_already_is_no_second_point(
    client: MlflowClient, run_id: str, logged: LoggedModels, folder: Path
) -> None:
    """MLflow shows a model's metrics as the run's too: the same time makes them the same point."""
    client.log_metric(run_id, "validation_loss", 3.0, timestamp=1_000, step=10)
    client.log_metric(run_id, "validation_loss", 2.0, timestamp=2_000, step=10)  # what the attempt before had
    published(logged, folder)
    assert sorted(points(client, run_id, "validation_loss")) == [(10, 2.0), (10, 3.0)]
    assert points(client, run_id, "train_loss_epoch") == [(10, 1.5)]


def test_a_repeat_that_differs_in_the_last_digits_takes_the_run_s_value(
    client: MlflowClient, run_id: str, logged: LoggedModels, folder: Path
) -> None:
    client.log_metric(run_id, "validation_loss", 2.0000001, timestamp=1_000, step=10)
    published(logged, folder)
    assert points(client, run_id, "validation_loss") == [(10, 2.0000001)]
    [model] = models(client, run_id)
    assert {m.key: m.value for m in model.metrics or []}["validation_loss"] == 2.0000001


def test_an_epoch_has_one_model_however_often_it_is_published(
    client: MlflowClient, run_id: str, logged: LoggedModels, folder: Path
) -> None:
    first = published(logged, folder)
    assert published(logged, folder) == first
    assert published(LoggedModels(client, run_id, "job-1"), folder) == first
    assert len(models(client, run_id)) == 1
    assert len(client.get_run(run_id).outputs.model_outputs) == 1


def test_what_a_killed_attempt_left_half_made_is_replaced_and_a_stranger_s_model_stays(
    client: MlflowClient, run_id: str, logged: LoggedModels, folder: Path
) -> None:
    tags = {TAG_CHECKPOINT: EPOCH_0.model_dump_json()}
    half = client.create_logged_model("0", name="epoch-0", source_run_id=run_id, tags=tags)
    stranger = client.create_logged_model("0", name="epoch-0", source_run_id=run_id)
    checkpoint = published(logged, folder)
    left = {model.model_id: model.status.value for model in models(client, run_id)}
    assert half.model_id not in left
    assert left == {checkpoint.path.removeprefix("models:/"): "READY", stranger.model_id: "PENDING"}


def test_a_cut_upload_goes_on_with_the_missing_files_alone(
    server: MLflowServer, client: MlflowClient, run_id: str, shards: Path
) -> None:
    cut = CutClient(server.uri, at=3, cut=server.stop)
    logged = LoggedModels(cut, run_id, "job-1")
    with pytest.raises(Exception, match=r"Connection refused|Max retries|Connection aborted"):
        published(logged, shards)
    server.start()
    [half] = models(client, run_id)
    assert half.status.value == "PENDING"
    assert logged.ready() == {}
    assert cut.sent == FILES[:3]

    published(logged, shards)
    assert cut.sent == [*FILES[:3], *FILES[2:]]
    [model] = models(client, run_id)
    assert (model.model_id, model.status.value) == (half.model_id, "READY")
    assert sorted(model_files(client, model.model_id)) == FILES


def test_another_process_sends_everything_anew(
    server: MLflowServer, client: MlflowClient, run_id: str, shards: Path
) -> None:
    """What it may find of a killed one's upload could be cut in the middle of a file."""
    with pytest.raises(Exception, match=r"Connection refused|Max retries|Connection aborted"):
        published(LoggedModels(CutClient(server.uri, at=3, cut=server.stop), run_id, "job-1"), shards)
    server.start()
    [half] = models(client, run_id)
    second = CutClient(server.uri, at=0, cut=None)
    published(LoggedModels(second, run_id, "job-1"), shards)
    assert second.sent == FILES
    [model] = models(client, run_id)
    assert model.model_id != half.model_id
    assert sorted(model_files(client, model.model_id)) == FILES


def test_a_half_made_model_that_somebody_deleted_is_made_anew(
    server: MLflowServer, client: MlflowClient, run_id: str, shards: Path
) -> None:
    def fail() -> None:
        raise ConnectionError("cut")

    cut = CutClient(server.uri, at=3, cut=fail)
    logged = LoggedModels(cut, run_id, "job-1")
    with pytest.raises(ConnectionError):
        published(logged, shards)
    [half] = models(client, run_id)
    client.delete_logged_model(half.model_id)
    published(logged, shards)
    assert cut.sent == [*FILES[:3], *FILES]
    [model] = models(client, run_id)
    assert sorted(model_files(client, model.model_id)) == FILES


def test_an_epoch_that_is_published_again_after_it_was_deleted_has_all_files(
    client: MlflowClient, run_id: str, logged: LoggedModels, shards: Path
) -> None:
    published(logged, shards)
    logged.delete(0)
    published(logged, shards)
    [model] = models(client, run_id)
    assert sorted(model_files(client, model.model_id)) == FILES


def test_a_lost_answer_to_the_last_request_makes_no_second_model(
    server: MLflowServer, client: MlflowClient, run_id: str, shards: Path
) -> None:
    class Deaf(CutClient):
        deaf = True

        def finalize_logged_model(self, model_id: str, status: Any) -> Any:
            model = super().finalize_logged_model(model_id, status)
            if self.deaf:
                self.deaf = False
                raise ConnectionError("the answer is lost")
            return model

    deaf = Deaf(server.uri, at=0, cut=None)
    logged = LoggedModels(deaf, run_id, "job-1")
    with pytest.raises(ConnectionError):
        published(logged, shards)
    checkpoint = published(logged, shards)
    assert deaf.sent == FILES
    [model] = models(client, run_id)
    assert checkpoint.path == f"models:/{model.model_id}"
    assert len(client.get_run(run_id).outputs.model_outputs) == 1


def test_only_what_is_ready_is_found_and_each_epoch_is_deleted_alone(
    client: MlflowClient, run_id: str, logged: LoggedModels, folder: Path
) -> None:
    made = {epoch: published(logged, folder, epoch) for epoch in (0, 1, 10)}
    tags = {TAG_CHECKPOINT: of_epoch(2).model_dump_json()}
    client.create_logged_model("0", name="epoch-2", source_run_id=run_id, tags=tags)
    assert logged.ready() == made
    logged.delete(1)
    logged.delete(7)  # there is none
    assert logged.ready().keys() == {0, 10}


def test_the_models_of_another_run_are_not_seen(client: MlflowClient, run_id: str, folder: Path) -> None:
    other = str(client.create_run("0").info.run_id)
    published(LoggedModels(client, other, "job-2"), folder)
    logged = LoggedModels(client, run_id, "job-1")
    logged.delete(0)
    assert logged.ready() == {}
    assert len(models(client, other)) == 1


def test_a_metric_that_is_not_finite_is_null_in_the_checkpoint(logged: LoggedModels, folder: Path) -> None:
    metrics = EPOCH_0.model_copy(update={"perplexity": math.inf})
    logged.publish(folder, step=1, metrics=metrics, points=[])
    found = logged.ready()[0].training_metrics
    assert found is not None
    assert (found.perplexity, found.validation_loss) == (None, 2.0)
