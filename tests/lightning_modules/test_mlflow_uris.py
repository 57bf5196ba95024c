"""Models and adapters in a real MLflow, under every name that it gives them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from mlflow import MlflowClient

from lightning_modules.base_model import Base, find_base, merge_adapter
from lightning_modules.models import load_tokenizer
from lightning_modules.process import is_permanent
from post_training.errors import ModelError
from post_training.schemas.trainer import TrackingTarget
from tests.lightning_modules.bases import find, load, logits, write_adapter

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer


@pytest.fixture(autouse=True)
def _mlflow_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")  # another server than the job's own


@pytest.fixture
def client(mlflow_server: MLflowServer) -> MlflowClient:
    return MlflowClient(mlflow_server.uri, registry_uri=mlflow_server.uri)


@pytest.fixture
def run_id(client: MlflowClient) -> str:
    return client.create_run("0").info.run_id


@pytest.fixture
def tracking(mlflow_server: MLflowServer, run_id: str) -> TrackingTarget:
    return TrackingTarget(tracking_uri=mlflow_server.uri, run_id=run_id)


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def log_model(client: MlflowClient, run_id: str, folder: Path, *, ready: bool = True) -> str:
    """Log a model as the trainer does; return its id."""
    model = client.create_logged_model("0", name="epoch-0", source_run_id=run_id)
    client.log_model_artifacts(model.model_id, str(folder))
    if ready:
        client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def register(client: MlflowClient, name: str, source: str, **of: str) -> str:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    return str(client.create_model_version(name, source, await_creation_for=None, **of).version)


def test_every_form_of_uri(
    client: MlflowClient,
    run_id: str,
    tracking: TrackingTarget,
    tiny_model_dir: Path,
    empty_cwd: Path,
    tmp_path: Path,
) -> None:
    model_id = log_model(client, run_id, tiny_model_dir)
    client.log_artifacts(run_id, str(tiny_model_dir), "model")
    registered, of_run = f"registered {run_id}", f"of-run {run_id}"
    register(client, registered, f"models:/{model_id}", model_id=model_id)
    register(client, of_run, f"runs:/{run_id}/epoch-0", run_id=run_id)
    client.set_registered_model_alias(registered, "champion", "1")
    names = {
        f"models:/{model_id}": f"models:/{model_id}",
        f"models:/{registered}/1": f"models:/{registered}/1",
        f"models:/{registered}@champion": f"models:/{registered}/1",
        f"models:/{of_run}/1": f"models:/{of_run}/1",
        f"runs:/{run_id}/model": f"runs:/{run_id}/model",
        f"runs:/{run_id}/epoch-0": f"runs:/{run_id}/epoch-0",
        f"mlflow-artifacts:/0/{run_id}/artifacts/model": f"mlflow-artifacts:/0/{run_id}/artifacts/model",
    }
    files = sorted(path.name for path in tiny_model_dir.iterdir())
    for uri, name in names.items():
        base = find(uri, tmp_path, tracking=tracking)
        assert base == Base(name, base.source, base.source), uri
        assert Path(base.source).is_relative_to(tmp_path / "base"), uri
        assert sorted(path.name for path in Path(base.source).iterdir()) == files, uri
    torch.testing.assert_close(logits(load(base.source)), logits(load(tiny_model_dir)), rtol=0, atol=0)
    assert load_tokenizer(base.tokenizer_source).chat_template
    assert not list(empty_cwd.iterdir())


def test_a_path_inside_and_a_single_file(
    client: MlflowClient, run_id: str, tracking: TrackingTarget, tmp_path: Path
) -> None:
    folder = tmp_path / "upload"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "model.gguf").write_bytes(b"GGUF")
    model_id = log_model(client, run_id, folder)
    name = f"nested {run_id}"
    register(client, name, f"models:/{model_id}", model_id=model_id)
    for uri in (f"models:/{model_id}", f"models:/{name}/1", f"runs:/{run_id}/epoch-0"):
        base = find(f"{uri}/inside/model.gguf", tmp_path, tracking=tracking)
        assert base.name == f"{uri}/inside/model.gguf"
        assert Path(base.source).name == "model.gguf"
        assert Path(base.source).read_bytes() == b"GGUF"


def test_a_retry_trains_on_what_the_first_attempt_found(
    client: MlflowClient, run_id: str, tracking: TrackingTarget, tmp_path: Path
) -> None:
    name = f"moving {run_id}"
    for number in (1, 2):
        folder = tmp_path / f"upload-{number}"
        folder.mkdir()
        (folder / "config.json").write_text(str(number))
        model_id = log_model(client, run_id, folder)
        register(client, name, f"models:/{model_id}", model_id=model_id)
    uri = f"models:/{name}@champion"
    client.set_registered_model_alias(name, "champion", "1")
    first = find(uri, tmp_path, tracking=tracking)
    client.set_registered_model_alias(name, "champion", "2")
    closed = TrackingTarget(tracking_uri="http://127.0.0.1:9", run_id=run_id)
    assert find(uri, tmp_path, tracking=closed) == first
    assert first.name == f"models:/{name}/1"
    assert (Path(first.source) / "config.json").read_text() == "1"
    other_worker = find_base(uri, tmp_path / "other", tracking, [])
    assert other_worker.name == f"models:/{name}/2"


def test_of_two_models_with_one_name_the_newer_one_is_meant(
    client: MlflowClient, run_id: str, tracking: TrackingTarget, tmp_path: Path
) -> None:
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(str(number))
        log_model(client, run_id, folder)
    base = find(f"runs:/{run_id}/epoch-0", tmp_path, tracking=tracking)
    assert (Path(base.source) / "config.json").read_text() == "2"


def test_an_adapter_in_mlflow_upon_a_model_in_mlflow(
    client: MlflowClient,
    run_id: str,
    tracking: TrackingTarget,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    base_id = log_model(client, run_id, tiny_model_dir)
    adapter = write_adapter(
        tmp_path / "adapter", tiny_model_dir, base_model_name_or_path=f"models:/{base_id}"
    )
    adapter_id = log_model(client, run_id, adapter)
    base = find(f"models:/{adapter_id}", tmp_path, tracking=tracking)
    assert base.name == f"models:/{adapter_id}"
    expected = logits(merge_adapter(load(tiny_model_dir), adapter))
    (folder,) = base.adapters
    torch.testing.assert_close(logits(merge_adapter(load(base.source), folder)), expected)


def test_a_download_is_complete_or_not_there(
    client: MlflowClient, run_id: str, tracking: TrackingTarget, tiny_model_dir: Path, tmp_path: Path
) -> None:
    uri = f"models:/{log_model(client, run_id, tiny_model_dir)}"
    with pytest.raises(ModelError):
        find(f"{uri}/none", tmp_path, tracking=tracking)
    assert {path.suffix for path in (tmp_path / "base").iterdir()} == {".tmp"}
    base = find(uri, tmp_path, tracking=tracking)
    kept = next(path for path in (tmp_path / "base").iterdir() if not path.suffix)
    shutil.move(kept, kept.with_suffix(".tmp"))  # what a killed attempt leaves
    (kept.with_suffix(".tmp") / "files" / "stale").mkdir()
    assert find(uri, tmp_path, tracking=tracking) == base


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("models:/m-" + "0" * 32, "Logged model with ID .* not found"),
        ("models:/nothing/1", "Registered Model with name=nothing not found"),
        ("models:/nothing@alias", "not found"),
        ("runs:/" + "0" * 32 + "/model", "Run with id=.* not found"),
        ("runs:/{run_id}/it's none", "404 Client Error"),
        ("mlflow-artifacts:/no/such", "404 Client Error"),
        ("mlflow-artifacts:/0/../../mlflow.db", "400 Client Error"),
    ],
)
def test_what_mlflow_does_not_have_is_not_asked_for_again(
    uri: str, sentence: str, tracking: TrackingTarget, tmp_path: Path
) -> None:
    name = uri.format(run_id=tracking.run_id)
    with pytest.raises(ModelError, match=f"MLflow does not give the model {name}: .*{sentence}") as caught:
        find(name, tmp_path, tracking=tracking)
    assert is_permanent(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_complete_is_refused(
    client: MlflowClient, run_id: str, tracking: TrackingTarget, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model_id = log_model(client, run_id, tiny_model_dir, ready=False)
    for uri in (f"models:/{model_id}", f"runs:/{run_id}/epoch-0"):
        with pytest.raises(ModelError, match=f"the logged model {model_id} in MLflow is PENDING, not READY"):
            find(uri, tmp_path, tracking=tracking)


@pytest.mark.parametrize("uri", ["models:/m-" + "0" * 32, "mlflow-artifacts:/model"])
def test_an_outage_may_be_over_at_the_next_attempt(uri: str, tmp_path: Path) -> None:
    closed = TrackingTarget(tracking_uri="http://127.0.0.1:9", run_id="0" * 32)
    with pytest.raises(ModelError, match=f"MLflow does not give the model {uri}: ") as caught:
        find(uri, tmp_path, tracking=closed)
    assert isinstance(caught.value.__cause__, OSError)
    assert not is_permanent(caught.value)


def test_a_job_without_a_server_has_no_models_in_mlflow(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lies on an MLflow server, and this job has none"):
        find("models:/name/1", tmp_path)


def test_an_adapter_names_no_other_server(
    tiny_model_dir: Path, tracking: TrackingTarget, tmp_path: Path
) -> None:
    folder = write_adapter(
        tmp_path / "adapter", tiny_model_dir, base_model_name_or_path="mlflow-artifacts://evil.example/model"
    )
    with pytest.raises(ModelError, match=r"mlflow-artifacts://evil\.example/model must name no host"):
        find(folder, tmp_path, tmp_path, tracking=tracking)


def test_a_store_on_this_disk_must_lie_under_a_root(
    client: MlflowClient, tracking: TrackingTarget, tiny_model_dir: Path, tmp_path: Path
) -> None:
    experiment = client.create_experiment(tmp_path.name, artifact_location=str(tiny_model_dir.parent))
    run = client.create_run(experiment).info
    (tiny_model_dir.parent / run.run_id).mkdir()
    (tiny_model_dir.parent / run.run_id / "artifacts").symlink_to(tiny_model_dir.parent)
    uri = f"runs:/{run.run_id}/{tiny_model_dir.name}"
    with pytest.raises(ModelError, match="under no folder of allowed_roots") as caught:
        find(uri, tmp_path, tmp_path / "elsewhere", tracking=tracking)
    assert is_permanent(caught.value)
    base = find(uri, tmp_path, tiny_model_dir.parent, tracking=tracking)
    assert (Path(base.source) / "config.json").read_bytes() == (tiny_model_dir / "config.json").read_bytes()
