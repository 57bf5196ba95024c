"""What the processes of a job tell each other, through torch.distributed."""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import psutil  # type: ignore[import-untyped]
import torch
from torch import distributed

from lightning_modules.ranks import ALONE, Ranks
from post_training.errors import HardwareError, TrainerError

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""For which others are waited for. Whoever is lost is missed sooner: its connections end. This is for one
that is slow: the first waits for MLflow, a leader downloads a model."""

KEEP_ALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_USER_TIMEOUT: 180_000}
"""Seconds before the kernel first asks after a silent machine, seconds between two questions, and
milliseconds without an answer, to them or to what was sent, until it ends the connection."""


def lost_another(error: BaseException) -> bool:
    """Whether an error says only that another process is heard no more, or one that it comes from does.

    gloo's errors have no class of their own; they name its file.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, distributed.DistError) or (type(seen) is RuntimeError and "gloo" in str(seen)):
            return True
        seen = seen.__cause__
    return False


@contextmanager
def _telling_of_lost_ones() -> Iterator[None]:
    """Say of an error that tells of another process's end what it means.

    :raises TrainerError: instead of it.
    """
    try:
        yield
    except Exception as error:
        if not lost_another(error):
            raise
        said = next(iter(str(error).splitlines()), type(error).__name__)
        without_place = re.sub(r"^\[\S*\] ", "", said)  # in gloo's code
        raise TrainerError(f"another process of this job is lost: {without_place}") from error


def keep_alive() -> None:
    """Let the kernel end this process's connections to a machine that is gone without a word.

    One that has lost its power or its network closes none of them, and gloo would wait for ``TIMEOUT``, or
    for the quarter of an hour that the kernel takes where something was sent. A machine answers however slow
    its processes are, and gloo sends nothing big that they do not wait for. See tcp(7), ``TCP_KEEPIDLE`` and
    ``TCP_USER_TIMEOUT``.
    """
    for connection in psutil.Process().net_connections(kind="tcp"):
        if connection.status == psutil.CONN_ESTABLISHED:
            with suppress(OSError):  # it has ended since
                _keep_alive(connection.fd)


def _keep_alive(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Together(Ranks):
    """One of several processes. Values travel over gloo, on the host; gradients where they lie."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes of each value, added in double precision."""
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return cast(list[float], total.tolist())

    def any(self, said: bool) -> bool:
        """Whether one of all processes says so."""
        return self.sums([float(said)])[0] > 0

    def gathered(self, value: T) -> list[T]:
        """Return what each process has, by rank: numbers, texts and tensors in lists and dicts."""
        box = io.BytesIO()
        torch.save(value, box)  # pickled alone, tensors of some types cannot be read
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, box.getvalue())
        return [torch.load(io.BytesIO(content), weights_only=True) for content in found]

    def told(self, value: T) -> T:
        """Return what the first process has."""
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.sums([0.0])


def devices_here() -> tuple[int, str]:
    """Return how many processes may train on this machine, and what each of them takes."""
    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"
    return len(os.sched_getaffinity(0)), "CPU cores"


def check_devices(wanted: int) -> None:
    """Refuse more devices than there are.

    :param wanted: on this machine.
    :raises HardwareError: naming field, rule and value.
    """
    here, what = devices_here()
    if wanted > here:
        raise HardwareError(
            f"runtime.devices must be at most {here}, the {what} of this machine, got {wanted}"
        )


@contextmanager
def joined(place: Ranks) -> Iterator[Ranks]:
    """Join the other processes of the job, if there are any; Ray Train has brought them together already.

    :raises HardwareError: if there is no device for this one.
    :raises TrainerError: if another one is lost meanwhile.
    """
    if place.world == 1:
        yield ALONE
        return
    ours = not distributed.is_initialized()
    if ours:
        check_devices(place.local_world)
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(place.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(backend, timeout=TIMEOUT)
    keep_alive()
    with _telling_of_lost_ones():
        yield Together(place.rank, place.world, place.local_rank, place.local_world)
    if ours:  # not after an error: it may wait for a process that is lost
        distributed.destroy_process_group()
