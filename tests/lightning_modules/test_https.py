"""Contents from a real https server on loopback, which the tests take for public or private."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lightning_modules.data.reading import read_dataset
from lightning_modules.data.sources import Limits
from tests.lightning_modules.fetched import ANYWHERE, JSONL, ROW, failure


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
    """A file, a redirect to it, an answer that breaks off, one without an end, and the status of a path."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if self.path == "/endless.jsonl":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # until the client has gone
                while True:
                    self.wfile.write(JSONL * 1000)
            return
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
    dataset = read_dataset(f"{https}/rows.jsonl?token=secret", limits=ANYWHERE)
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


def test_a_host_that_leads_to_a_private_address_hears_nothing(https: str) -> None:
    """The name was public when the request came in, and is not when the data is read."""
    asked: list[str] = []
    Answers.seen.clear()
    private = Limits(may_be_reached=lambda address: asked.append(address) is not None)
    assert failure(f"{https}/rows.jsonl", limits=private) == (
        "the host 127.0.0.1 leads to the private address 127.0.0.1",
        True,
    )
    assert asked == ["127.0.0.1"]
    assert (
        failure(f"{https}/rows.jsonl", limits=Limits())[0]
        == failure(f"{https}/rows.jsonl", limits=private)[0]
    )
    assert Answers.seen == []


def test_nothing_is_sent_before_the_address_is_known() -> None:
    """Not even TLS's first message, in which the host's name stands."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        failure(f"https://127.0.0.1:{listener.getsockname()[1]}/rows.jsonl", limits=Limits())
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30)
            assert connection.recv(1) == b""


def test_behind_a_proxy_it_is_the_proxy_that_decides(https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks the host up; that its own address is private says nothing."""
    target = int(https.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.delenv("no_proxy")
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        proxy = threading.Thread(target=tunnel_once, args=(listener, target))
        proxy.start()
        dataset = read_dataset(f"{https}/rows.jsonl", limits=Limits())
        proxy.join()
    assert [row.value for row in dataset.rows] == [ROW]


def tunnel_once(listener: socket.socket, port: int) -> None:
    """Be an HTTP proxy for one CONNECT to a port of this machine."""
    client, _ = listener.accept()
    with client, socket.create_connection(("127.0.0.1", port)) as server:
        assert client.recv(65536).startswith(b"CONNECT 127.0.0.1:")
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        back = threading.Thread(target=pump, args=(server, client))
        back.start()
        pump(client, server)
        back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends."""
    with suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


def test_the_largest_file_and_one_byte_more(https: str) -> None:
    fits = replace(ANYWHERE, max_bytes=len(JSONL))
    assert [row.value for row in read_dataset(f"{https}/rows.jsonl", limits=fits).rows] == [ROW]
    assert failure(f"{https}/rows.jsonl?token=secret", limits=replace(fits, max_bytes=len(JSONL) - 1)) == (
        f"the data set {https}/rows.jsonl is larger than the limit of {len(JSONL) - 1} bytes",
        True,
    )


def test_an_answer_without_an_end_is_left_at_the_limit(https: str) -> None:
    said, permanent = failure(f"{https}/endless.jsonl", limits=replace(ANYWHERE, max_bytes=3_000_000))
    assert said.endswith("endless.jsonl is larger than the limit of 3000000 bytes")
    assert permanent
