"""What the processes of a job tell each other, through torch.distributed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from lightning_modules.ranks import ALONE, Ranks
from post_training.errors import HardwareError

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""For which others are waited for. Whoever is lost closes its connections, and torchrun ends the rest; this
is for one that is slow: the first waits for MLflow, a leader downloads a model."""


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
    """
    if place.world == 1:
        yield ALONE
        return
    if distributed.is_initialized():
        yield Together(place.rank, place.world, place.local_rank, place.local_world)
        return
    check_devices(place.local_world)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    yield Together(place.rank, place.world, place.local_rank, place.local_world)
    distributed.destroy_process_group()  # not after an error: it may wait for a process that is lost
