"""The job's record against a real MLflow server, through outages and retries."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from lightning_modules.mlflow_record import open_mlflow_record
from lightning_modules.record import (
    HTTP_LIMITS,
    SPOOL_FILE,
    LocalRecord,
    flatten,
    open_record,
)
from lightning_modules.spool import Spool
from post_training.errors import InputsChangedError, RecordUnavailableError
from post_training.schemas.jobs import Checkpoint
from post_training.schemas.record import TAG_CHECKPOINT_COPY_PREFIX
from post_training.schemas.trainer import TrainerSpec
from tests.lightning_modules.recorded import (
    EPOCH_0,
    begun,
    models,
    of_epoch,
    points,
    read_table,
    retried,
    table_of,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer


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
    [data] = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("gsm8k", ("ab" * 32)[:36])
    assert json.loads(data.dataset.profile) == {"num_rows": 7, "sha256": "ab" * 32, "source": "/d/x.jsonl"}
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}


SECRET_URIS = (
    "https://me:secret@host/x.jsonl?sig=secret",
    "s3://key:secret@bucket/x.jsonl?X-Amz-Signature=secret#secret",
    "huggingface://datasets/org/name?split=train&token=secret",
    "runs:/0123/x.jsonl?token=secret",
    "data:text/csv;base64," + "c2VjcmV0" * 1000,
)


def test_a_data_set_that_is_named_by_its_uri_gives_no_secret_away(
    client: MlflowClient, run_id: str, spec: TrainerSpec
) -> None:
    record = open_record(spec)
    for name in SECRET_URIS:
        record.log_dataset(name=name, digest="ab", source=name, rows=1, context="training")
    record.close()
    datasets = [data.dataset for data in client.get_run(run_id).inputs.dataset_inputs]
    names = {"https://host/x.jsonl", "s3://bucket/x.jsonl", "org/name", "runs:/0123/x.jsonl"}
    assert {data.name for data in datasets} == names | {"data:text/csv;base64,..."}
    assert {json.loads(data.profile)["source"] for data in datasets} == {data.name for data in datasets}
    text = str([data.to_dictionary() for data in datasets])
    assert "secret" not in text
    assert "c2VjcmV0" not in text


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
    assert monotonic() - started < 20.0

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
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
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
    assert monotonic() - started < 30.0
    assert "was not sent in 0.5 s and is kept on disk" in caplog.text

    server.start()
    record = begun(retried(spec))
    for step in (3, 4, 5):  # resumed from the checkpoint of step 2
        record.log_metrics({"train_loss": float(step)}, step)
    record.close()
    assert points(client, run_id) == [(step, float(step)) for step in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("trained", [True, False], ids=["it had trained", "it fails before it begins"])
def test_what_another_machine_recorded_since_is_not_sent_by_a_retry_that_never_begins(
    trained: bool, server: MLflowServer, client: MlflowClient, run_id: str, spec: TrainerSpec, tmp_path: Path
) -> None:
    server.stop()
    first = open_record(spec, close_timeout=0.2)
    for step in (1, 2):
        first.log_metrics({"train_loss": float(step)}, step)
    first.close()
    server.start()
    elsewhere = begun(retried(spec, work_dir=tmp_path / "elsewhere"))
    for step in (1, 2):
        elsewhere.log_metrics({"train_loss": float(step)}, step)
    elsewhere.close()

    back = open_record(retried(spec))
    if trained:
        back.settled([], [], lambda: False)
    back.close()
    assert points(client, run_id) == [(1, 1.0), (2, 2.0)]


def test_an_attempt_on_another_machine_asks_mlflow_what_is_recorded(
    client: MlflowClient, run_id: str, spec: TrainerSpec, tmp_path: Path
) -> None:
    record = open_record(spec)
    for step in (1, 2, 3):
        record.log_metrics({"train_loss": float(step)}, step)
    record.close()

    record = begun(retried(spec, work_dir=tmp_path / "elsewhere"))
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


def test_a_run_that_is_deleted_and_restored_loses_no_point(
    client: MlflowClient, run_id: str, spec: TrainerSpec, caplog: pytest.LogCaptureFixture
) -> None:
    record = open_record(spec)
    client.delete_run(run_id)
    for step in (1, 2):
        record.log_metrics({"train_loss": float(step)}, step)
    wait_until(lambda: "is kept on disk" in caplog.text)
    client.restore_run(run_id)
    record.log_metrics({"train_loss": 3.0}, 3)
    record.close()
    assert points(client, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def noted(client: MlflowClient, run_id: str) -> dict[str, Checkpoint]:
    tags = client.get_run(run_id).data.tags
    return {
        key.removeprefix(TAG_CHECKPOINT_COPY_PREFIX): Checkpoint.model_validate_json(value)
        for key, value in tags.items()
        if key.startswith(TAG_CHECKPOINT_COPY_PREFIX)
    }


def test_a_noted_checkpoint_is_a_tag_and_no_model(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    record = open_record(spec)
    checkpoint = record.note_checkpoint(folder, metrics=EPOCH_0)
    record.close()
    assert noted(client, run_id) == {"0": checkpoint}
    assert (checkpoint.identifier, checkpoint.epoch, checkpoint.path) == (
        "job-1-epoch-0",
        0,
        folder.as_posix(),
    )
    assert (checkpoint.post_training_job_id, checkpoint.training_metrics) == ("job-1", EPOCH_0)
    assert models(client, run_id) == []


def test_a_discarded_note_is_gone_and_others_stay(
    client: MlflowClient, run_id: str, spec: TrainerSpec, folder: Path
) -> None:
    record = open_record(spec)
    checkpoints = [record.note_checkpoint(folder, metrics=of_epoch(epoch)) for epoch in (0, 1, 10)]
    record.discard_checkpoint(checkpoints[1])
    record.discard_checkpoint(checkpoints[0])
    record.note_checkpoint(folder, metrics=of_epoch(0))  # behind the removal
    record.close()
    assert noted(client, run_id).keys() == {"0", "10"}


COLUMNS = ("step", "answer")


@pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes")  # MLflow's own log_table
def test_tables_are_mlflow_s_and_each_is_the_last_one_logged(
    client: MlflowClient, run_id: str, spec: TrainerSpec
) -> None:
    client.log_table(run_id, {"by": ["another"]}, "theirs.json")
    record = open_record(spec)
    record.log_table("samples.json", COLUMNS, [[0, "no"], [1, "well"]])
    record.log_table("bad_rows.json", ("row", "reason"), [[7, "no answer"]])
    record.close()
    record = begun(retried(spec))
    record.log_table("samples.json", COLUMNS, [[0, "no"], [3, 'ä "\n\u2028']])
    record.close()

    assert table_of(client, run_id, "samples.json") == {"step": [0, 3], "answer": ["no", 'ä "\n\u2028']}
    assert table_of(client, run_id, "bad_rows.json") == {"row": [7], "reason": ["no answer"]}
    assert table_of(client, run_id, "theirs.json") == {"by": ["another"]}
    listed = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    names = ["theirs.json", "samples.json", "bad_rows.json"]
    assert listed == [{"path": name, "type": "table"} for name in names]


def test_a_table_holds_only_what_json_can_say(spec: TrainerSpec) -> None:
    record = open_record(spec)
    record.log_table("t.json", ("a", "b", "c"), [(math.nan, -math.inf, 1.5), (None, Path("/x"), "y")])
    record.close()
    text = (spec.work_dir / "tables" / "t.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "columns": ["a", "b", "c"],
        "data": [[None, None, 1.5], [None, "/x", "y"]],
    }


def test_tables_wait_for_the_end_of_an_outage_and_nothing_waits_for_them(
    server: MLflowServer, client: MlflowClient, run_id: str, spec: TrainerSpec
) -> None:
    server.stop()
    started = monotonic()
    first = open_record(spec, close_timeout=0.2)
    first.log_table("bad_rows.json", ("row", "reason"), [[7, "no answer"]])
    first.log_table("samples.json", COLUMNS, [[0, "no"]])
    first.close()
    second = open_record(retried(spec))
    second.log_table("samples.json", COLUMNS, [[0, "no"], [1, "yes"]])
    assert monotonic() - started < 20.0
    server.start()
    second.begin("x", here=None, give_up=lambda: False)
    second.close()
    assert table_of(client, run_id, "bad_rows.json") == {"row": [7], "reason": ["no answer"]}
    assert table_of(client, run_id, "samples.json") == {"step": [0, 1], "answer": ["no", "yes"]}


def test_a_broken_artifact_store_holds_up_tables_alone(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as in production: the server closes the connection on which it failed, and a client may have it in use
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    blocked = server.home / "artifacts" / "0" / run_id  # a file where the run's folder would be
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.touch()
    record = open_record(spec)
    record.log_table("samples.json", COLUMNS, [[0, "no"]])
    wait_until(lambda: "kept on disk" in caplog.text)
    record.log_metrics({"train_loss": 1.0}, 1)
    wait_until(lambda: points(client, run_id) == [(1, 1.0)])
    blocked.unlink()
    record.close()
    assert table_of(client, run_id, "samples.json") == {"step": [0], "answer": ["no"]}


def test_a_checkpoint_without_files_is_an_error(tmp_path: Path, spec: TrainerSpec) -> None:
    record = open_record(spec)
    with pytest.raises(ValueError, match="has none"):
        record.log_checkpoint(tmp_path / "nothing", step=1, metrics=EPOCH_0)
    with pytest.raises(ValueError, match="has none"):
        record.note_checkpoint(tmp_path / "nothing", metrics=EPOCH_0)
    record.close()


def test_without_tracking_the_folder_is_the_record(tmp_path: Path, spec: TrainerSpec, folder: Path) -> None:
    record = open_record(spec.model_copy(update={"tracking": None}))
    assert isinstance(record, LocalRecord)
    record.log_metrics({"train_loss": 1.0}, 1)
    record.set_tag("a", "b")
    assert record.log_checkpoint(folder, step=1, metrics=EPOCH_0).path == folder.as_posix()
    checkpoint = record.note_checkpoint(folder, metrics=EPOCH_0)
    record.discard_checkpoint(checkpoint)
    record.log_table("samples.json", COLUMNS, [(0, "no")])
    record.close()
    lines = [json.loads(line) for line in (spec.work_dir / SPOOL_FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["metrics", "tag", "tag", "untag"]
    assert lines[2]["key"] == lines[3]["key"] == "post_training.checkpoint.0"
    assert Checkpoint.model_validate_json(lines[2]["value"]) == checkpoint
    assert read_table(spec.work_dir, "samples.json") == [[0, "no"]]


def test_http_limits_are_set_where_none_are(spec: TrainerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    open_record(spec).close()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == HTTP_LIMITS["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_params_are_flattened() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [1, "x"]}, "e": True, "f": {}, "g": Path("/x")}
    assert flatten(nested) == {"a.b.c": "1", "a.d": '[1, "x"]', "e": "true", "f": "{}", "g": "/x"}


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lightning_modules")


def test_an_attempt_elsewhere_waits_for_mlflow_to_say_what_is_recorded(
    server: MLflowServer,
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client.log_metric(run_id, "train_loss", 1.0, step=1)
    server.stop()

    def come_back() -> None:
        wait_until(lambda: "did not answer and is asked again" in caplog.text)
        server.start()

    back = Thread(target=come_back)
    back.start()
    record = begun(retried(spec))  # its folder is empty
    for step in (1, 2):
        record.log_metrics({"train_loss": float(step)}, step)
    record.close()
    back.join()
    assert points(client, run_id) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_attempt_that_would_train_something_else_is_refused_and_sends_what_was_left(
    client: MlflowClient, run_id: str, spec: TrainerSpec, tmp_path: Path, elsewhere: bool
) -> None:
    """Its own training belongs into another run; what the one before spooled last belongs into this one."""
    first = begun(spec, "old data")
    first.log_metrics({"train_loss": 1.0}, 1)
    first.close()
    Spool(spec.work_dir / SPOOL_FILE, run_id).append([{"kind": "tag", "key": "old", "value": "1"}])
    second = open_record(retried(spec, work_dir=tmp_path / "elsewhere") if elsewhere else retried(spec))
    with pytest.raises(InputsChangedError, match="no longer what the attempts before trained from"):
        second.begin("new data", here=None if elsewhere else "old data", give_up=lambda: False)
    second.close()
    assert points(client, run_id) == [(1, 1.0)]
    tags = client.get_run(run_id).data.tags
    assert tags["post_training.inputs"] == "old data"
    assert ("old" in tags) is not elsewhere


def test_a_run_is_left_for_another_when_all_that_waited_for_it_is_sent(
    client: MlflowClient, run_id: str, spec: TrainerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves it deletes the folder in which the rest lies."""
    begun(spec, "old data").close()
    file = spec.work_dir / SPOOL_FILE
    Spool(file, run_id).append([{"kind": "tag", "key": "old", "value": "1"}])
    log_batch, outage = MlflowClient.log_batch, True

    def failing(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if outage:
            raise ConnectionError("not now")
        return log_batch(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    second = open_mlflow_record(retried(spec), file, close_timeout=0.0, patience=0.5)
    with pytest.raises(RecordUnavailableError, match=r"did not take its record in 0\.5 s"):
        second.begin("new data", here="old data", give_up=lambda: False)
    second.close()
    outage = False
    third = open_mlflow_record(retried(spec, attempt=3), file, close_timeout=0.0)
    with pytest.raises(InputsChangedError):
        third.begin("new data", here="old data", give_up=lambda: False)
    assert client.get_run(run_id).data.tags["old"] == "1"
    third.close()


def test_what_waits_of_one_training_is_not_sent_into_the_run_of_another(
    client: MlflowClient, run_id: str, spec: TrainerSpec, tmp_path: Path
) -> None:
    """This machine had no way to MLflow; another one began the run with other data since."""
    Spool(spec.work_dir / SPOOL_FILE, run_id).append([{"kind": "tag", "key": "of old data", "value": "1"}])
    begun(retried(spec, work_dir=tmp_path / "elsewhere"), "new data").close()
    third = open_record(retried(spec, attempt=3))
    with pytest.raises(InputsChangedError):
        third.begin("new data", here="old data", give_up=lambda: False)
    third.close()
    tags = client.get_run(run_id).data.tags
    assert tags["post_training.inputs"] == "new data"
    assert "of old data" not in tags


def test_the_first_attempt_of_a_dag_run_that_was_triggered_again_goes_on_in_the_run(
    client: MlflowClient, run_id: str, spec: TrainerSpec, tmp_path: Path
) -> None:
    first = begun(spec)
    first.log_metrics({"train_loss": 1.0}, 1)
    first.close()
    again = begun(spec.model_copy(update={"begun": True, "work_dir": tmp_path / "anew"}))
    for step in (1, 2):
        again.log_metrics({"train_loss": float(step)}, step)
    again.close()
    assert points(client, run_id) == [(1, 1.0), (2, 2.0)]
