"""The run in MLflow of a training that no Airflow runs, against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from post_training.cli.run_record import FolderRecord, MLflowRunRecord, record_at
from post_training.errors import InvalidRequestError, JobConflictError, RecordUnavailableError
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.trainer import TrainerSpec
from tests.mlflow_server import MLflowServer
from tests.requests_of import sft_body

REQUEST = SupervisedFineTuneRequest.model_validate(
    sft_body(logger_config={"run_name": "mine", "tags": {"team": "a"}})
)


@pytest.fixture
def record(mlflow_server: MLflowServer) -> MLflowRunRecord:
    record = record_at(mlflow_server.uri, None)
    assert isinstance(record, MLflowRunRecord)
    return record


def spec_of(record: MLflowRunRecord, folder: Path) -> TrainerSpec:
    """A spec whose run is made."""
    return TrainerSpec(
        request=REQUEST,
        model="org/model",
        train_data="/rows.jsonl",
        validation_data=None,
        checkpoint_dir=None,
        work_dir=folder,
        attempt=3,
        tracking=record.make(REQUEST, {"post_training.train_data": "runs:/1/rows.jsonl"}),
    )


def test_it_is_a_run_as_a_deployments_but_of_no_airflow(
    record: MLflowRunRecord, mlflow_server: MLflowServer, folder: Path
) -> None:
    spec = spec_of(record, folder)
    assert spec.tracking is not None
    run_id, client = spec.tracking.run_id, MlflowClient(mlflow_server.uri)
    run = client.get_run(run_id)
    assert run.info.status == "SCHEDULED"
    assert run.info.run_name == "mine"
    ours = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    assert ours == {
        "team": "a",
        "post_training.job_uuid": "job-1",
        "post_training.method": "supervised_fine_tune",
        "post_training.payload_hash": REQUEST.payload_hash(),
        "post_training.deployment": "none",
        "post_training.train_data": "runs:/1/rows.jsonl",
    }
    assert run.data.params["training_config.n_epochs"] == "1"
    assert [file.path for file in client.list_artifacts(run_id)] == ["request.json"]
    assert client.get_experiment(run.info.experiment_id).name == "post-training"
    record.begin(spec)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["post_training.attempt"]) == ("RUNNING", "3")
    log = folder / "train-3.log"
    log.write_text("progress")
    record.end(spec, "FAILED", "no such file", log)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["post_training.error"]) == ("FAILED", "no such file")
    assert [file.path for file in client.list_artifacts(run_id, "logs")] == ["logs/train-3.log"]
    assert record.url(spec) == f"{mlflow_server.uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    record.begin(spec)
    assert "post_training.error" not in client.get_run(run_id).data.tags
    record.end(spec, "FINISHED")
    ended = client.get_run(run_id).info.end_time
    record.end(spec, "FINISHED")
    assert client.get_run(run_id).info.end_time == ended


def test_a_run_that_was_deleted_is_not_gone_on_with(
    record: MLflowRunRecord, mlflow_server: MLflowServer, folder: Path
) -> None:
    spec = spec_of(record, folder)
    assert spec.tracking is not None
    MlflowClient(mlflow_server.uri).delete_run(spec.tracking.run_id)
    with pytest.raises(JobConflictError, match="which is deleted: choose another --work-dir"):
        record.begin(spec)


def test_an_end_that_mlflow_does_not_take_is_told_and_no_error(
    record: MLflowRunRecord, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(record, folder)

    def unavailable(*_: object, **__: object) -> None:
        raise RecordUnavailableError("MLflow does not answer")

    for method in ("set_status", "get"):
        monkeypatch.setattr(f"post_training.tracking.Tracking.{method}", unavailable)
    record.end(spec, "FINISHED")
    assert "warning: MLflow does not answer" in capsys.readouterr().err
    assert record.url(spec) is None
    with pytest.raises(RecordUnavailableError):
        record.begin(spec)


def test_the_experiment_may_be_chosen(mlflow_server: MLflowServer) -> None:
    target = record_at(mlflow_server.uri, "of my own").make(REQUEST, {})
    assert target is not None
    client = MlflowClient(mlflow_server.uri)
    run = client.get_run(target.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "of my own"


def test_registered_data_is_found_in_the_same_mlflow(record: MLflowRunRecord) -> None:
    assert record.registered("nothing", None) is None
    assert FolderRecord().registered is None


def test_a_login_in_the_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidRequestError, match="--tracking-uri: must hold no login") as caught:
        record_at("http://me:secret@mlflow", None)
    assert "secret" not in str(caught.value)


def test_an_experiment_without_mlflow_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="needs a tracking URI, got 'mine'"):
        record_at(None, "mine")


@pytest.mark.parametrize(
    "logger", [{"experiment_name": "a"}, {"run_name": "a"}, {"tags": {"a": "b"}}, {"log_every_n_steps": 2}]
)
def test_the_folder_alone_has_no_names_of_mlflow(logger: dict[str, object]) -> None:
    request = SupervisedFineTuneRequest.model_validate(sft_body(logger_config=logger))
    record = record_at(None, None)
    if "log_every_n_steps" in logger:
        record.check(request)
        return
    (name,) = logger
    with pytest.raises(InvalidRequestError, match=f"^logger_config.{name}: needs MLflow"):
        record.check(request)
