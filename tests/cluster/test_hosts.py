"""Services that share a machine and have addresses of their own."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest

from cluster.hosts import Forwarder, free_network, with_addresses
from post_training.standalone_layout import free_ports

ADDRESSES = {"redis": "127.9.9.2", "api-server": "127.9.9.3", "server": "127.9.9.4"}


@pytest.mark.parametrize(
    ("text", "translated"),
    [
        ("redis://:pw@redis:6379/0", "redis://:pw@127.9.9.2:6379/0"),
        ("http://api-server:8080/x", "http://127.9.9.3:8080/x"),
        ("server:1,my-server:1,a.server:1", "127.9.9.4:1,my-server:1,a.server:1"),
        ("redis-server redis", "redis-server redis"),
    ],
)
def test_names_before_a_port_become_addresses(text: str, translated: str) -> None:
    assert with_addresses(text, ADDRESSES) == translated


def test_addresses_are_free_and_a_port_taken_everywhere_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"on all addresses, port {port}"):
            free_network([port], 2)
    found = free_network([port], 3)
    assert len({*found}) == 3
    assert all(address.startswith("127.") for address in found)


def test_connections_are_passed_on_both_ways_until_the_end() -> None:
    front, back = free_ports(2)
    with socket.create_server(("127.0.0.1", back)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                asked = b"".join(iter(lambda: connection.recv(100), b""))
                connection.sendall(asked.upper())

        thread = threading.Thread(target=answer)
        thread.start()
        forwarder = Forwarder({("127.9.9.9", front): back})
        forwarder.start()
        try:
            with socket.create_connection(("127.9.9.9", front), timeout=30) as client:
                client.sendall(b"a" * 100_000)
                client.shutdown(socket.SHUT_WR)
                answered = b"".join(iter(lambda: client.recv(65536), b""))
        finally:
            forwarder.stop()
        thread.join()
    assert answered == b"A" * 100_000
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.9.9.9", front), timeout=30)


def test_connections_that_are_open_end_with_it() -> None:
    front, back = free_ports(2)
    with socket.create_server(("127.0.0.1", back)) as server:
        forwarder = Forwarder({("127.9.9.9", front): back})
        forwarder.start()
        with socket.create_connection(("127.9.9.9", front), timeout=30) as client:
            client.sendall(b"asked")
            connection, _ = server.accept()
            with connection:
                connection.settimeout(30)
                assert connection.recv(5) == b"asked"
                forwarder.stop()
                for end in (client, connection):
                    with suppress(ConnectionResetError):
                        assert end.recv(1) == b""
        forwarder.stop()
