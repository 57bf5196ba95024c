"""The record, against a real MLflow server."""

from __future__ import annotations

import json
import sqlite3
import urllib.request
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from post_training.errors import InvalidRequestError, RecordUnavailableError
from post_training.job_ids import TaskKey
from post_training.record import identity_tags
from post_training.schemas import record as names
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric
from post_training.tracking import JobRun, Tracking, TrackingServer
from tests.mlflow_server import MLflowServer


@pytest.fixture
def tracking(mlflow_server: MLflowServer) -> Tracking:
    return Tracking(TrackingServer(mlflow_server.uri))


@pytest.fixture
def client(mlflow_server: MLflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.uri)


def create(tracking: Tracking, job_uuid: str, **fields: Any) -> JobRun:
    defaults: dict[str, Any] = {
        "name": job_uuid,
        "experiment": None,
        "tags": {names.TAG_JOB_UUID: job_uuid},
        "params": {"a": 1},
        "request": {"job_uuid": job_uuid},
    }
    return tracking.create_run(**{**defaults, **fields})


def test_a_new_run_is_scheduled_and_holds_the_request(tracking: Tracking, client: MlflowClient) -> None:
    run = create(tracking, "new", params={f"p{i}": "x" * 7000 for i in range(150)})
    assert (run.status, run.ended_at) == ("SCHEDULED", None)
    assert tracking.get(run.run_id) == run
    stored = client.get_run(run.run_id)
    assert len(stored.data.params) == 150
    assert {len(value) for value in stored.data.params.values()} == {6000}
    path = client.download_artifacts(run.run_id, names.ARTIFACT_REQUEST)
    assert json.loads(Path(path).read_text()) == {"job_uuid": "new"}


def test_an_experiment_does_not_choose_a_folder_of_who_writes_to_it(
    tracking: Tracking, client: MlflowClient, tmp_path: Path
) -> None:
    """MLflow lets who may make an experiment say where its artifacts go, and its clients write there."""
    private, shared = tmp_path / "private-folder", tmp_path / "shared-folder"
    for folder in (private, shared):
        client.create_experiment(folder.name, artifact_location=folder.as_uri())
    (shared / "link").parent.mkdir()
    (shared / "link").symlink_to(private)
    client.create_experiment("linked", artifact_location=str(shared / "link"))
    tracking.server = replace(tracking.server, roots=(shared,))
    for name in ("private-folder", "linked"):
        with pytest.raises(InvalidRequestError, match=rf"outside .* allowed_roots, got '{name}'") as caught:
            create(tracking, "refused", experiment=name)
        assert caught.value.errors[0]["loc"] == ["logger_config", "experiment_name"]
    assert tracking.find("refused") is None
    assert not private.exists()
    run = create(tracking, "allowed", experiment="shared-folder")
    assert (shared / run.run_id / "artifacts" / names.ARTIFACT_REQUEST).exists()
    own = Tracking(replace(tracking.server, experiment="private-folder"))
    create(own, "by the deployment")
    assert private.exists()


def test_where_mlflow_itself_places_experiments_is_the_deployments_choice(tmp_path: Path) -> None:
    """A server that does not pass artifacts on: its clients write to a disk that they share."""
    tracking = Tracking(TrackingServer(f"sqlite:///{tmp_path / 'mlflow.db'}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        create(tracking, "first", experiment="named")
        assert create(tracking, "again", experiment="named").status == "SCHEDULED"


def test_a_forged_default_experiment_does_not_choose_a_folder(tmp_path: Path) -> None:
    """It is known by its id: its name may be taken once somebody has renamed it, or MLflow deleted it."""
    tracking = Tracking(TrackingServer(f"sqlite:///{tmp_path / 'mlflow.db'}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        client = tracking.client
        client.rename_experiment("0", "gone")
        client.create_experiment("Default", artifact_location=(tmp_path / "elsewhere" / "0").as_uri())
        client.create_experiment("forged", artifact_location=(tmp_path / "elsewhere" / "1").as_uri())
        with pytest.raises(InvalidRequestError, match=r"outside .* allowed_roots"):
            create(tracking, "refused", experiment="forged")
        assert create(tracking, "allowed", experiment="named").status == "SCHEDULED"
        with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as database:
            database.execute("DELETE FROM experiments WHERE experiment_id = 0")
        with pytest.raises(InvalidRequestError, match=r"outside .* allowed_roots"):
            create(tracking, "refused", experiment="forged")


def test_runs_are_found_by_job_over_all_experiments(tracking: Tracking) -> None:
    mine = create(tracking, "find-me", experiment="another experiment")
    create(tracking, "not-me")
    found = tracking.find("find-me")
    assert found is not None
    assert found.run_id == mine.run_id
    assert tracking.find("nobody") is None
    assert tracking.find("find-me'") is None
    assert tracking.find("' OR '1'='1") is None


def test_the_runs_of_another_airflow_are_left_alone(tracking: Tracking) -> None:
    here, there = (
        Tracking(replace(tracking.server, deployment=f"http://{name}")) for name in ("here", "there")
    )
    tags = identity_tags(TaskKey("supervised_fine_tune", "shared", "train"))
    ours, theirs = (
        where.create_run(
            name="", experiment="shared", tags=tags | {"post_training.method": "a"}, params={}, request={}
        )
        for where in (here, there)
    )
    for where, own, other in ((here, ours, theirs), (there, theirs, ours)):
        found = where.find("shared")
        assert found is not None
        assert found.run_id == own.run_id
        unsettled = {run.run_id for run in where.unsettled_runs(datetime.now(UTC))}
        assert own.run_id in unsettled
        assert other.run_id not in unsettled


def test_a_run_without_an_airflow_is_nobodys(tracking: Tracking) -> None:
    alone = Tracking(replace(tracking.server, deployment=names.NO_DEPLOYMENT))
    tags = {names.TAG_JOB_UUID: "alone", names.TAG_METHOD: "a"}
    made = alone.create_run(name="", experiment=None, tags=tags, params={}, request={})
    for deployment in ("", "http://here"):
        where = Tracking(replace(tracking.server, deployment=deployment))
        assert where.find("alone") is None
        assert made.run_id not in {run.run_id for run in where.unsettled_runs(datetime.now(UTC))}


def test_a_run_that_supersedes_another_is_the_jobs_before_older_ones(tracking: Tracking) -> None:
    forgotten, first = create(tracking, "again"), create(tracking, "again")
    assert tracking.find("again") == forgotten
    assert tracking.successor(first.run_id) is None
    tags = {names.TAG_JOB_UUID: "again", names.TAG_SUPERSEDES: first.run_id}
    second = create(tracking, "again", tags=tags, experiment="of another name")
    assert tracking.successor(first.run_id) == second
    assert tracking.find("again") == second
    last = create(tracking, "again", tags=tags | {names.TAG_SUPERSEDES: second.run_id})
    assert tracking.find("again") == last
    tracking.set_tags(second.run_id, {names.TAG_ATTEMPT_ID: "0199-a"})
    found = tracking.find("again")
    assert found is not None
    assert found.run_id == second.run_id, "in the last one no attempt has begun"
    tracking.set_tags(forgotten.run_id, {names.TAG_ATTEMPT_ID: "0199-b"})
    found = tracking.find("again")
    assert found is not None
    assert found.run_id == forgotten.run_id, "its attempt is the newest"


def test_a_run_is_found_among_more_experiments_than_mlflow_lists_at_once(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracking.create_run(
        name="", experiment="old", tags={"post_training.job_uuid": "old"}, params={}, request={}
    )
    for number in range(2):
        tracking.experiment(f"newer-{number}")
    paged = partial(tracking.client.search_experiments, max_results=1)
    monkeypatch.setattr(tracking.client, "search_experiments", paged)
    found = tracking.find("old")
    assert found is not None
    assert found.run_id == run.run_id


def test_a_discarded_run_is_gone(tracking: Tracking) -> None:
    run = create(tracking, "discarded")
    tracking.discard(run.run_id)
    assert tracking.get(run.run_id) is None
    assert tracking.find("discarded") is None
    assert tracking.get("0" * 32) is None


def test_status_and_reason(tracking: Tracking) -> None:
    run = create(tracking, "status")
    tracking.set_status(run.run_id, "RUNNING")
    tracking.set_status(run.run_id, "FAILED", error="Row 3 is bad.")
    failed = tracking.get(run.run_id)
    assert failed is not None
    assert (failed.status, failed.tags[names.TAG_ERROR]) == ("FAILED", "Row 3 is bad.")
    assert failed.ended_at is not None
    assert failed.ended_at >= failed.created_at
    tracking.set_status(run.run_id, "RUNNING")
    again = tracking.get(run.run_id)
    assert again is not None
    assert (again.status, again.ended_at) == ("RUNNING", None)
    assert names.TAG_ERROR not in again.tags
    tracking.set_status(run.run_id, "FINISHED", ended_at=failed.ended_at)
    ended = tracking.get(run.run_id)
    assert ended is not None
    assert (ended.status, ended.ended_at, ended.completed) == ("FINISHED", failed.ended_at, False)
    tracking.set_tags(run.run_id, {names.TAG_MAX_TRIES: "3"})
    completed = tracking.get(run.run_id)
    assert completed is not None
    assert completed.completed


def test_params_are_added_and_never_changed(tracking: Tracking, client: MlflowClient) -> None:
    run = create(tracking, "params")
    tracking.add_params(run.run_id, {"a": 2, "b": 3})
    assert client.get_run(run.run_id).data.params == {"a": "1", "b": "3"}


def test_files_and_tags(tracking: Tracking, client: MlflowClient, tmp_path: Path) -> None:
    run = create(tracking, "files")
    (tmp_path / "train.log").write_text("loss")
    tracking.add_file(run.run_id, tmp_path / "train.log", "logs")
    tracking.set_tags(run.run_id, {"x": "y"})
    assert [f.path for f in client.list_artifacts(run.run_id, "logs")] == ["logs/train.log"]
    assert client.get_run(run.run_id).data.tags["x"] == "y"


def test_checkpoints_are_the_finished_models_oldest_first(tracking: Tracking, client: MlflowClient) -> None:
    run = create(tracking, "checkpoints")
    for epoch, ready in ((0, True), (1, True), (2, False)):
        metrics = PostTrainingMetric(epoch=epoch, train_loss=2.0, validation_loss=1.0, perplexity=2.7)
        model = client.create_logged_model(
            run.experiment_id,
            name=f"epoch-{epoch}",
            source_run_id=run.run_id,
            tags={names.TAG_CHECKPOINT: metrics.model_dump_json()},
        )
        if ready:
            client.finalize_logged_model(model.model_id, "READY")
            client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, epoch)])
    first, second = tracking.checkpoints(run)
    assert (first.identifier, second.identifier) == ("checkpoints-epoch-0", "checkpoints-epoch-1")
    assert first.path.startswith("models:/m-")
    assert second.training_metrics is not None
    assert second.training_metrics.model_dump() == {
        "epoch": 1,
        "train_loss": 2.0,
        "validation_loss": 1.0,
        "perplexity": 2.7,
    }
    assert first.created_at <= second.created_at


def test_checkpoints_that_were_not_uploaded_are_listed_where_no_model_is(
    tracking: Tracking, client: MlflowClient
) -> None:
    run = create(tracking, "copies")
    for epoch in (10, 2, 1):
        copy = Checkpoint(
            identifier=f"copies-epoch-{epoch}",
            created_at=datetime(2026, 11, 24, tzinfo=UTC),
            epoch=epoch,
            post_training_job_id="copies",
            path=f"checkpoints/copies/epoch-{epoch}",
        )
        tags = {f"{names.TAG_CHECKPOINT_COPY_PREFIX}{epoch}": copy.model_dump_json()}
        tracking.set_tags(run.run_id, tags)
    metrics = PostTrainingMetric(epoch=2, train_loss=2.0, validation_loss=1.0, perplexity=2.7)
    model = client.create_logged_model(
        run.experiment_id,
        name="epoch-2",
        source_run_id=run.run_id,
        tags={names.TAG_CHECKPOINT: metrics.model_dump_json()},
    )
    unfinished = tracking.checkpoints(fresh(tracking, run))
    assert [checkpoint.epoch for checkpoint in unfinished] == [1, 2, 10]
    assert unfinished[1] == Checkpoint.model_validate(
        {**unfinished[0].model_dump(), "identifier": "copies-epoch-2", "epoch": 2}
        | {"path": "checkpoints/copies/epoch-2"}
    )
    client.finalize_logged_model(model.model_id, "READY")
    finished = tracking.checkpoints(fresh(tracking, run))
    assert [(checkpoint.epoch, checkpoint.path) for checkpoint in finished] == [
        (1, "checkpoints/copies/epoch-1"),
        (2, f"models:/{model.model_id}"),
        (10, "checkpoints/copies/epoch-10"),
    ]


def fresh(tracking: Tracking, run: JobRun) -> JobRun:
    """Return the run as it is now."""
    found = tracking.get(run.run_id)
    assert found is not None
    return found


def test_a_server_that_does_not_answer_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = MLflowServer(tmp_path)
    tracking = Tracking(TrackingServer(server.uri))
    with pytest.raises(RecordUnavailableError, match="MLflow does not answer"):
        tracking.ping()


def test_the_run_url_is_a_page(tracking: Tracking, mlflow_server: MLflowServer) -> None:
    run = create(tracking, "url")
    url = tracking.server.run_url(run.experiment_id, run.run_id)
    assert url.startswith(mlflow_server.uri)
    with urllib.request.urlopen(url.partition("#")[0]) as page:
        assert page.status == 200
