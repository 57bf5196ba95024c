"""The job's record against a real MLflow server, through outages and retries."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import mlflow
import pytest
from mlflow import MlflowClient

from lightning_modules.delivery import describe_source
from lightning_modules.mlflow_record import MLflowRecord
from lightning_modules.record import HTTP_LIMITS, SPOOL_FILE, LocalRecord, flatten, open_record
from lightning_modules.spool import Spool
from post_training.errors import RecordUnavailableError
from post_training.schemas.jobs import PostTrainingMetric
from post_training.schemas.record import TAG_CHECKPOINT, TAG_JOB_UUID
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.trainer import TrackingTarget, TrainerSpec
from tests.requests_of import sft_body

if TYPE_CHECKING:
    from tests.conftest import MLflowServer

EPOCH_0 = PostTrainingMetric(epoch=0, train_loss=1.5, validation_loss=2.0, perplexity=math.exp(2.0))


@pytest.fixture(autouse=True)
def _short_http_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given limits are kept by ``open_record``, and undone after the test."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@pytest.fixture
def server(mlflow_server: MLflowServer) -> Iterator[MLflowServer]:
    """The shared server, running again at the end whatever a test did to it."""
    yield mlflow_server
    if not mlflow_server.running:
        mlflow_server.start()


@pytest.fixture
def client(server: MLflowServer) -> MlflowClient:
    return MlflowClient(server.uri)


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return client.create_run("0").info.run_id


@pytest.fixture
def spec(server: MLflowServer, run_id: str, tmp_path: Path) -> TrainerSpec:
    return TrainerSpec(
        request=SupervisedFineTuneRequest.model_validate(sft_body()),
        model="/model",
        train_data="/train.jsonl",
        validation_data=None,
        checkpoint_dir=None,
        work_dir=tmp_path / "job",
        attempt=1,
        tracking=TrackingTarget(tracking_uri=server.uri, run_id=run_id),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder, one file in a folder below it."""
    made = tmp_path / "checkpoint"
    (made / "tokenizer").mkdir(parents=True)
    (made / "adapter.safetensors").write_bytes(os.urandom(100_000))
    (made / "tokenizer" / "vocab.json").write_text("{}")
    return made


def retried(spec: TrainerSpec, **changes: Any) -> TrainerSpec:
    return spec.model_copy(update={"attempt": 2, **changes})


def points(client: MlflowClient, run_id: str, key: str = "train_loss") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def models(client: MlflowClient, run_id: str) -> list[Any]:
    return list(client.search_logged_models(["0"], filter_string=f"source_run_id = '{run_id}'"))


def test_everything_reaches_the_run_and_its_status_is_left_alone(
    client: MlflowClient, run_id: str, spec: TrainerSpec
) -> None:
    record = open_record(spec)
    record.log_params({"optimizer": {"lr": 1e-3, "name": "adamw"}, "long": "x" * 7000, "none": None})
    record.set_tag("color", "red")
    record.set_tag("color", "blue")
    record.log_dataset(name="gsm8k", digest="ab" * 32, source="/d/x.jsonl", rows=7, context="training")
    for step in range(1, 2501):
        record.log_metrics({"train_loss": 1 / step}, step)
    record.log_artifact(spec.work_dir / SPOOL_FILE, "logs")
    record.close()

    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {
        "optimizer.lr": "0.001",
        "optimizer.name": "adamw",
        "long": "x" * 6000,
        "none": "null",
    }
    assert run.data.tags["color"] == "blue"
    assert points(client, run_id) == [(step, 1 / step) for step in range(1, 2501)]
    assert [file.path for file in client.list_artifacts(run_id, "logs")] == [f"logs/{SPOOL_FILE}"]
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("gsm8k", ("ab" * 32)[:36])
    assert json.loads(data.dataset.profile) == {"num_rows": 7, "sha256": "ab" * 32}
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}


def test_a_data_set_that_is_named_by_its_uri_gives_no_secret_away(
    client: MlflowClient, run_id: str, spec: TrainerSpec
) -> None:
    record = open_record(spec)
    for name in ("https://me:secret@host/x.jsonl?sig=secret", "data:text/csv;base64," + "QUJD" * 1000):
        record.log_dataset(name=name, digest="ab", source=name, rows=1, context="training")
    record.close()
    datasets = [data.dataset for data in client.get_run(run_id).inputs.dataset_inputs]
    assert {data.name for data in datasets} == {"https://host/x.jsonl", "data:text/csv;base64,..."}
    assert "secret" not in str([data.to_dictionary() for data in datasets])


def test_values_that_are_not_finite_are_recorded_as_nan(
    client: MlflowClient, run_id: str, spec: TrainerSpec, caplog: pytest.LogCaptureFixture
) -> None:
    record = open_record(spec)
    for step, value in enumerate([1.0, math.inf, -math.inf, math.nan]):
        record.log_metrics({"train_loss": value}, step)
    record.close()

    values = [value for _, value in points(client, run_id)]
    assert values[0] == 1.0
    assert [math.isnan(value) for value in values[1:]] == [True, True, True]
    assert caplog.text.count("recorded as NaN") == 1


def test_an_outage_at_the_start_neither_stops_nor_blocks_and_loses_nothing(
    server: MLflowServer, client: MlflowClient, run_id: str, spec: TrainerSpec
) -> None:
    server.stop()
    started = monotonic()
    record = open_record(spec)
    record.log_params({"seed": 42})
    for step in range(200):
        record.log_metrics({"train_loss": float(step)}, step)
    assert monotonic() - started < 1.0

    server.start()
    record.log_metrics({"train_loss": 200.0}, 200)
    record.close()
    assert points(client, run_id) == [(step, float(step)) for step in range(201)]
    assert client.get_run(run_id).data.params == {"seed": "42"}


def test_a_request_whose_answer_is_lost_is_not_recorded_twice(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    record = open_record(spec)
    server.signal(signal.SIGSTOP)  # it takes the request and does not answer in time
    record.log_metrics({"train_loss": 1.0}, 1)
    try:
        wait_until(lambda: "kept on disk" in caplog.text)
    finally:
        server.signal(signal.SIGCONT)
    record.log_metrics({"train_loss": 2.0}, 2)
    record.close()
    assert points(client, run_id) == [(1, 1.0), (2, 2.0)]


def test_close_is_bounded_and_a_later_attempt_sends_the_rest_once(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = open_record(spec, close_timeout=0.5)
    record.log_metrics({"train_loss": 1.0}, 1)
    wait_until(lambda: points(client, run_id) == [(1, 1.0)])
    server.stop()
    for step in (2, 3, 4):
        record.log_metrics({"train_loss": float(step)}, step)
    started = monotonic()
    record.close()
    assert monotonic() - started < 3.0
    assert "was not sent in 0.5 s and is kept on disk" in caplog.text

    server.start()
    record = open_record(retried(spec))
    for step in (3, 4, 5):  # resumed from the checkpoint of step 2
        record.log_metrics({"train_loss": float(step)}, step)
    record.close()
    assert points(client, run_id) == [(step, float(step)) for step in (1, 2, 3, 4, 5)]


def test_an_attempt_on_another_machine_asks_mlflow_what_is_recorded(
    client: MlflowClient, run_id: str, spec: TrainerSpec, tmp_path: Path
) -> None:
    record = open_record(spec)
    for step in (1, 2, 3):
        record.log_metrics({"train_loss": float(step)}, step)
    record.close()

    record = open_record(retried(spec, work_dir=tmp_path / "elsewhere"))
    for step in (2, 3, 4):
        record.log_metrics({"train_loss": float(step)}, step)
    record.close()
    assert points(client, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_what_mlflow_refuses_is_reported_and_holds_nothing_up(
    client: MlflowClient, run_id: str, spec: TrainerSpec, caplog: pytest.LogCaptureFixture
) -> None:
    client.log_param(run_id, "seed", "1")
    record = open_record(spec)
    record.log_params({"seed": 2, "lr": 3})
    record.log_metrics({"no*such*name": 1.0}, 1)
    record.log_metrics({"train_loss": 1.0}, 1)
    record.close()
    assert client.get_run(run_id).data.params == {"seed": "1", "lr": "3"}
    assert points(client, run_id) == [(1, 1.0)]
    assert caplog.text.count("refused") == 2


def test_a_checkpoint_is_listed_with_its_metrics_and_comes_back_byte_for_byte(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = open_record(spec)
    record.log_metrics({"validation_loss": 2.0, "train_loss": 1.1}, 10)
    checkpoint = record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    record.close()

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
    assert {metric.key: metric.value for metric in model.metrics} == {
        "train_loss_epoch": 1.5,
        "validation_loss": 2.0,
        "perplexity": math.exp(2.0),
    }
    outputs = client.get_run(run_id).outputs.model_outputs
    assert [(output.model_id, output.step) for output in outputs] == [(model.model_id, 10)]
    assert points(client, run_id, "validation_loss") == [(10, 2.0)]
    assert points(client, run_id, "train_loss") == [(10, 1.1)]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    copy = Path(mlflow.artifacts.download_artifacts(checkpoint.path))
    for file in ("adapter.safetensors", "tokenizer/vocab.json"):
        assert (copy / file).read_bytes() == (folder / file).read_bytes()


def test_starting_over_forgets_checkpoints_and_steps(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    first = open_record(spec)
    first.log_metrics({"train_loss": 1.0}, 1)
    first.log_checkpoint(folder, step=1, metrics=EPOCH_0)
    first.close()
    second = open_record(retried(spec))
    second.start_over()
    second.log_metrics({"train_loss": 5.0}, 1)
    second.close()
    assert models(client, run_id) == []
    assert sorted(points(client, run_id)) == [(1, 1.0), (1, 5.0)]


def test_a_discarded_checkpoint_is_gone_and_another_stays(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    record = open_record(spec)
    first = record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    second = record.log_checkpoint(folder, step=20, metrics=EPOCH_0.model_copy(update={"epoch": 1}))
    record.discard_checkpoint(first)
    record.close()
    assert [f"models:/{model.model_id}" for model in models(client, run_id)] == [second.path]


def test_a_retry_returns_the_checkpoint_that_is_there_and_removes_half_made_ones(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    client.create_logged_model("0", name="epoch-0", source_run_id=run_id)  # killed while uploading
    first = open_record(spec)
    checkpoint = first.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    first.close()
    second = open_record(retried(spec))
    assert second.log_checkpoint(folder, step=10, metrics=EPOCH_0) == checkpoint
    second.close()
    assert [f"models:/{model.model_id}" for model in models(client, run_id)] == [checkpoint.path]
    assert len(client.get_run(run_id).outputs.model_outputs) == 1


def test_a_failed_upload_leaves_no_model(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    (folder / "z.bin").symlink_to(folder / "missing")
    record = MLflowRecord(
        client, run_id, job_uuid="job-1", spool=Spool(spec.work_dir / SPOOL_FILE, run_id), pauses=[0.0]
    )
    with pytest.raises(RecordUnavailableError, match="checkpoint of epoch 0"):
        record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    record.close()
    assert models(client, run_id) == []


def test_during_an_outage_a_checkpoint_fails_and_an_artifact_warns(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.stop()
    record = MLflowRecord(
        client, run_id, job_uuid="job-1", spool=Spool(spec.work_dir / SPOOL_FILE, run_id), pauses=[0.0]
    )
    with pytest.raises(RecordUnavailableError):
        record.log_checkpoint(folder, step=10, metrics=EPOCH_0)
    record.log_artifact(folder / "adapter.safetensors", "logs")
    assert "did not take the file" in caplog.text
    record.close()


def test_a_checkpoint_without_files_is_an_error(tmp_path: Path, spec: TrainerSpec) -> None:
    record = open_record(spec)
    with pytest.raises(ValueError, match="has none"):
        record.log_checkpoint(tmp_path / "nothing", step=1, metrics=EPOCH_0)
    record.close()


def test_without_tracking_the_folder_is_the_record(tmp_path: Path, spec: TrainerSpec, folder: Path) -> None:
    record = open_record(spec.model_copy(update={"tracking": None}))
    assert isinstance(record, LocalRecord)
    record.log_metrics({"train_loss": 1.0}, 1)
    record.set_tag("a", "b")
    assert record.log_checkpoint(folder, step=1, metrics=EPOCH_0).path == folder.as_posix()
    record.close()
    lines = [json.loads(line) for line in (spec.work_dir / SPOOL_FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["metrics", "tag"]


def test_http_limits_are_set_where_none_are(spec: TrainerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    open_record(spec).close()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == HTTP_LIMITS["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


@pytest.mark.parametrize(
    ("source", "described"),
    [
        ("/data/x.jsonl", ("local", {"uri": "/data/x.jsonl"})),
        ("file:///data/x.jsonl", ("local", {"uri": "/data/x.jsonl"})),
        ("https://me:secret@host/x.jsonl?sig=secret", ("http", {"url": "https://host/x.jsonl"})),
        ("s3://bucket/x.jsonl", ("s3", {"uri": "s3://bucket/x.jsonl"})),
        (
            "huggingface://datasets/org/name?split=train",
            ("huggingface", {"uri": "huggingface://datasets/org/name?split=train"}),
        ),
        ("data:text/csv;base64,QUJD", ("data", {"uri": "data:text/csv;base64,..."})),
    ],
)
def test_a_source_is_described_without_secrets(source: str, described: tuple[str, dict[str, str]]) -> None:
    assert describe_source(source) == described


def test_params_are_flattened() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1, "x"]}, "e": True, "f": {}, "g": Path("/x")}
    assert flatten(nested) == {"a.b.c": "1", "a.d": '[1, "x"]', "e": "true", "f": "{}", "g": "/x"}


def wait_until(condition: Any, timeout: float = 20.0) -> None:
    deadline = monotonic() + timeout
    while not condition():
        assert monotonic() < deadline


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning_modules")
