"""Contents from real servers on loopback: https with a certificate, S3, MLflow."""

from __future__ import annotations

import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import s3fs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer

from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import first_line, shown
from lightning_modules.train import is_permanent
from post_training.errors import DataError
from tests.conftest import MLflowServer

JSONL = b'{"question": "2+2?", "answer": "4"}\n'
ROW = {"question": "2+2?", "answer": "4"}


def failure(source: str, tracking_uri: str | None = None) -> tuple[str, bool]:
    """What reading a source says, in one sentence, and whether another attempt would say the same."""
    with pytest.raises(DataError) as caught:
        read_dataset(source, tracking_uri)
    assert "\n" not in str(caught.value)
    return str(caught.value), is_permanent(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


class Answers(BaseHTTPRequestHandler):
    """A file, a redirect to it, an answer that breaks off, and the status that a path names."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        status = {"/rows.jsonl": 200, "/cut.jsonl": 200, "/moved.jsonl": 302}.get(path) or int(path[1:4])
        self.send_response(status)
        self.send_header("Location", "/rows.jsonl")
        self.send_header("Content-Length", str(len(JSONL) + (path == "/cut.jsonl")))
        self.end_headers()
        self.wfile.write(JSONL)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def https(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server whose certificate is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_https(https: str) -> None:
    dataset = read_dataset(f"{https}/rows.jsonl?token=secret")
    assert ([row.value for row in dataset.rows], dataset.source) == ([ROW], f"{https}/rows.jsonl")


@pytest.mark.parametrize(
    ("path", "sentence", "permanent"),
    [
        ("moved.jsonl", "the server answers 302, and redirects are not followed", True),
        ("404.jsonl", "404.jsonl does not exist", True),
        ("403.jsonl", "the server answers 403", True),
        ("429.jsonl", "HTTP Error 429", False),
        ("503.jsonl", "HTTP Error 503", False),
        ("cut.jsonl", "IncompleteRead", False),
    ],
)
def test_https_failures(https: str, path: str, sentence: str, permanent: bool) -> None:
    said, is_final = failure(f"{https}/{path}?token=secret")
    assert sentence in said
    assert "secret" not in said
    assert is_final is permanent


def test_an_unknown_certificate_is_refused(https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    assert "certificate verify failed" in failure(f"{https}/rows.jsonl")[0]


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


def test_a_reason_is_one_line_and_not_endless() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 400)) == "x" * 300 + " …"
