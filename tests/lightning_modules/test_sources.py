"""Contents from real servers on loopback: S3, MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import s3fs
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import Limits, first_line, shown
from lightning_modules.process import is_permanent
from post_training.errors import DataError
from tests.lightning_modules.fetched import JSONL, ROW, failure
from tests.mlflow_server import MLflowServer


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """An S3 server with one bucket, to which the environment leads."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    client.put_object(Bucket="bucket", Key="deep/rows.jsonl", Body=JSONL)
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()  # one of another test would go on with that one's server
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3(s3: ThreadedMotoServer) -> None:
    dataset = read_dataset("s3://bucket/deep/rows.jsonl")
    assert [row.value for row in dataset.rows] == [ROW]
    assert dataset.source == "s3://bucket/deep/rows.jsonl"
    small = Limits(max_bytes=len(JSONL) - 1)
    assert failure("s3://bucket/deep/rows.jsonl", limits=small) == (
        f"the data set s3://bucket/deep/rows.jsonl is larger than the limit of {len(JSONL) - 1} bytes",
        True,
    )
    assert failure("s3://bucket/gone.jsonl") == ("the data set s3://bucket/gone.jsonl does not exist", True)
    assert failure("s3://no-bucket/x.jsonl") == ("the data set s3://no-bucket/x.jsonl does not exist", True)


def test_a_store_that_does_not_answer_may_answer_later(
    s3: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    said, permanent = failure("s3://bucket/deep/rows.jsonl")
    assert said.startswith("cannot read the data set s3://bucket/deep/rows.jsonl: Could not connect")
    assert not permanent


@pytest.mark.parametrize(
    ("scheme", "package"), [("gs", "gcsfs"), ("gcs", "gcsfs"), ("abfs", "adlfs"), ("abfss", "adlfs")]
)
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said, permanent = failure(f"{scheme}://bucket/rows.jsonl")
    assert said.startswith(f"cannot read the data set {scheme}://bucket/rows.jsonl: ")
    assert f"nstall {package} to access" in said
    assert permanent


def test_unknown_schemes_and_chains_are_refused(tmp_path: Path) -> None:
    assert (
        failure("nosuch://user:secret@host/rows.jsonl?token=secret")[0]
        == "cannot read the data set nosuch://host/rows.jsonl: Protocol not known: nosuch"
    )
    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    for source in (f"simplecache::file://{tmp_path}/rows.jsonl", f"s3://b/k.jsonl::{tmp_path}/rows.jsonl"):
        assert "must not be a chain of addresses" in failure(source)[0]


@pytest.fixture(scope="module")
def artifacts(mlflow_server: MLflowServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The addresses of one file, in a run and in a logged model."""
    client = MlflowClient(mlflow_server.uri, registry_uri=mlflow_server.uri)
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "my rows.jsonl").write_bytes(JSONL)
    run = client.create_run("0").info
    client.log_artifacts(run.run_id, str(folder), "deep")
    model = client.create_logged_model("0", name="model", source_run_id=run.run_id)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.create_registered_model("with data")
    client.create_model_version("with data", f"models:/{model.model_id}", model_id=model.model_id)
    return [
        f"runs:/{run.run_id}/deep/my rows.jsonl",
        f"models:/{model.model_id}/my rows.jsonl",
        "models:/with data/1/my rows.jsonl",
        f"mlflow-artifacts:/0/{run.run_id}/artifacts/deep/my rows.jsonl",
    ]


READ_ALL = """
import json, sys
from lightning_modules.data.reading import read_dataset
tracking_uri, *sources = sys.argv[1:]
for source in sources:
    dataset = read_dataset(source, tracking_uri)
    print(json.dumps([dataset.source, [row.value for row in dataset.rows]]))
"""


def test_artifacts_are_read_and_nothing_is_left(
    mlflow_server: MLflowServer, artifacts: list[str], tmp_path: Path
) -> None:
    """In a new process: MLflow makes the database of its global server once."""
    temporary, working = tmp_path / "temporary", tmp_path / "working"
    temporary.mkdir()
    working.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}
    environment["MLFLOW_REGISTRY_URI"] = "http://127.0.0.1:1"  # another's; the job has one server
    command = [sys.executable, "-c", READ_ALL, mlflow_server.uri, *artifacts]
    done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines()]
    assert read == [[source, [ROW]] for source in artifacts]
    assert list(working.iterdir()) == []
    assert list(temporary.rglob("*.jsonl")) == []


def test_artifacts_that_are_not_there(mlflow_server: MLflowServer, artifacts: list[str]) -> None:
    for address in artifacts:
        gone = address.replace("my rows", "gone")
        assert failure(gone, mlflow_server.uri) == (f"the data set {gone} does not exist", True)
    assert "Run with id=0123 not found" in failure("runs:/0123/x.jsonl", mlflow_server.uri)[0]


def test_artifacts_have_the_same_limit(mlflow_server: MLflowServer, artifacts: list[str]) -> None:
    for address in artifacts:
        said, _ = failure(address, mlflow_server.uri, Limits(max_bytes=len(JSONL) - 1))
        assert said == f"the data set {address} is larger than the limit of {len(JSONL) - 1} bytes"


def test_artifacts_are_judged_before_they_are_downloaded(
    mlflow_server: MLflowServer, artifacts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("it was downloaded")

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", refuse)
    for address in artifacts:
        assert "larger than the limit" in failure(address, mlflow_server.uri, Limits(max_bytes=1))[0]


def test_a_folder_of_artifacts_is_no_data_set(mlflow_server: MLflowServer, tmp_path: Path) -> None:
    client = MlflowClient(mlflow_server.uri)
    run = client.create_run("0").info
    (tmp_path / "part.jsonl").write_bytes(JSONL)
    client.log_artifact(run.run_id, str(tmp_path / "part.jsonl"), "rows.jsonl")
    source = f"runs:/{run.run_id}/rows.jsonl"
    assert failure(source, mlflow_server.uri) == (f"the data set {source} is a folder, not a file", True)


def test_a_store_on_this_disk_must_lie_under_a_root(mlflow_server: MLflowServer, tmp_path: Path) -> None:
    client = MlflowClient(mlflow_server.uri)
    run = client.create_run(client.create_experiment(tmp_path.name, str(tmp_path / "store"))).info
    (tmp_path / "store" / run.run_id / "artifacts").mkdir(parents=True)
    (tmp_path / "store" / run.run_id / "artifacts" / "rows.jsonl").write_bytes(JSONL)
    source = f"runs:/{run.run_id}/rows.jsonl"
    dataset = read_dataset(source, mlflow_server.uri, [tmp_path / "elsewhere", tmp_path / "store"])
    assert [row.value for row in dataset.rows] == [ROW]
    for roots in ([], [tmp_path / "elsewhere"]):
        with pytest.raises(DataError, match="under no folder of allowed_roots") as caught:
            read_dataset(source, mlflow_server.uri, roots)
        assert is_permanent(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "mlflow-artifacts://127.0.0.1:80/0/x.jsonl",
        "mlflow-artifacts:/0/../x.jsonl",
        "runs:/1/a/%2e%2e/%2E%2E/x.jsonl",
        "models://host/m-1/x.jsonl",
    ],
)
def test_artifacts_of_elsewhere_are_refused(source: str) -> None:
    assert failure(source, "http://127.0.0.1:1")[0].endswith("without a host or '..'")


def test_artifacts_need_a_server_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for source in ("runs:/1/x.jsonl", "mlflow-artifacts:/x.jsonl"):
        said, permanent = failure(source)
        assert said == f"the data set {source} lies on an MLflow server, and this job has none"
        assert permanent
        said, permanent = failure(source, "http://127.0.0.1:1")
        assert said.startswith(f"cannot read the data set {source}: API request to http://127.0.0.1:1")
        assert not permanent


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/data/rows.jsonl", "/data/rows.jsonl"),
        ("https://user:secret@host:1/rows.jsonl?token=secret#secret", "https://host:1/rows.jsonl"),
        ("data:text/csv;base64,c2VjcmV0", "data:text/csv;base64"),
        ("DATA:text/csv,secret", "DATA:text/csv"),
        ("huggingface://datasets/o/n?split=test", "huggingface://datasets/o/n?split=test"),
        ("runs:/1/x.jsonl", "runs:/1/x.jsonl"),
        ("abfs://box@me.dfs.core.windows.net/x.jsonl", "abfs://box@me.dfs.core.windows.net/x.jsonl"),
    ],
)
def test_what_is_shown_of_a_source(source: str, expected: str) -> None:
    assert shown(source) == expected


def test_a_link_that_took_the_place_of_a_file_leads_nowhere(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for file in (tmp_path / "outside.jsonl", root / "inside.jsonl"):
        file.write_bytes(JSONL)
    (root / "rows.jsonl").symlink_to(tmp_path / "outside.jsonl")
    (root / "link.jsonl").symlink_to("inside.jsonl")
    for source in (f"{root}/rows.jsonl", f"file://{root}/rows.jsonl"):
        with pytest.raises(DataError, match=r"rows\.jsonl lies under no folder of allowed_roots") as caught:
            read_dataset(source, roots=(root,))
        assert is_permanent(caught.value)
        assert [row.value for row in read_dataset(source).rows] == [ROW], "without roots all are allowed"
    for name in ("link.jsonl", "inside.jsonl"):
        assert [row.value for row in read_dataset(f"{root}/{name}", roots=(root,)).rows] == [ROW]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert failure(f"{tmp_path}/rows.jsonl") == (f"the data set {tmp_path}/rows.jsonl does not exist", True)


def test_a_reason_is_one_line_and_not_endless() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 400)) == "x" * 300 + " …"
