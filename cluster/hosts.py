"""Addresses of services that share one machine: each has its own on loopback, and the ports of an image."""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial

_NETWORKS_TRIED = 20


def host_name() -> str:
    """Return by what name others reach this process: Airflow's ``[core] hostname_callable``."""
    return os.environ["HOSTNAME"]


def free_network(ports: Iterable[int], count: int) -> list[str]:
    """Find addresses on loopback on which nothing listens.

    :param ports: that must be free on all of them.
    :param count: of addresses.
    :raises RuntimeError: if somebody listens on one of the ports on every address.
    """
    ports = sorted(set(ports))
    for _ in range(_NETWORKS_TRIED):
        network = f"127.{random.randrange(16, 250)}.{random.randrange(256)}"  # noqa: S311
        addresses = [f"{network}.{host}" for host in range(2, 2 + count)]
        taken = [port for port in ports if not all(_is_free(address, port) for address in addresses)]
        if not taken:
            return addresses
    raise RuntimeError(f"another program listens on all addresses, port {', '.join(map(str, taken))}")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def with_addresses(text: str, addresses: Mapping[str, str]) -> str:
    """Replace ``NAME:PORT`` by ``ADDRESS:PORT`` for every service's name."""
    names = "|".join(map(re.escape, sorted(addresses, key=len, reverse=True)))
    return re.sub(
        rf"(?<![\w.-])({names})(?=:\d)",
        lambda found: addresses[found[1]],
        text,
    )


class Forwarder:
    """Passes connections on, in a thread: for servers that listen on all addresses of the machine.

    :param routes: (address, port) that is listened on -> port on loopback that it is passed on to.
    """

    def __init__(self, routes: Mapping[tuple[str, int], int]) -> None:
        self._routes = routes
        self._servers: list[asyncio.Server] = []
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen.

        :raises OSError: if somebody else does.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="forwarder", daemon=True)
        self._thread.start()
        for (address, port), target in self._routes.items():
            listening = asyncio.start_server(partial(_serve, target=target), address, port)
            self._servers.append(asyncio.run_coroutine_threadsafe(listening, self._loop).result())

    def stop(self) -> None:
        """Listen no more, and end all connections. May be repeated."""
        if self._thread is not None and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        await asyncio.sleep(0)  # a connection of this very moment has its task then
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int) -> None:
    with suppress(OSError):
        async with _ended(writer):
            answers, onward = await asyncio.open_connection("127.0.0.1", target)
            async with _ended(onward):
                await asyncio.gather(_copy(reader, onward), _copy(answers, writer))


@asynccontextmanager
async def _ended(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close it when all is sent, and at once if the task is cancelled."""
    try:
        yield
        writer.close()
        await writer.wait_closed()
    finally:
        writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
