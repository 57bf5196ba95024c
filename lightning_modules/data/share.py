"""Which rows of a batch a process takes, where several train one job together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """A process's part of every batch of the job, whose rows are those of all its devices.

    Rows of like length stand beside each other, so the processes take turns. Each takes every row once, in as
    many micro-batches as every other: they wait for each other in each.

    :param devices: with which the request counts: batches are theirs, however many processes there are.
    :param rank: of the process.
    :param world: processes that there are: fewer than devices where some were lost.
    """

    devices: int = 1
    rank: int = 0
    world: int = 1

    def rows(self, batch_size: int) -> int:
        """Return the rows of a batch of the job.

        :param batch_size: rows of a micro-batch on a device.
        """
        return batch_size * self.devices

    def micros(self, rows: Sequence[T], batch_size: int) -> list[list[T]]:
        """Divide rows into the micro-batches of this process; one is empty where there is no row for it.

        :param rows: of one or more batches of the job, the last of which may be short.
        """
        whole = self.rows(batch_size)
        return [
            list(part[self.rank :: self.world][at : at + batch_size])
            for start in range(0, len(rows), whole)
            for part in [rows[start : start + whole]]
            for at in range(0, -(-len(part) // self.world), batch_size)
        ]

    def of_rank(self, rank: int) -> Share:
        """Return another process's."""
        return replace(self, rank=rank)


WHOLE = Share()
"""That of a process that trains alone."""
