"""The processes that train one job together, one for each device: who this one is among them.

torchrun starts them and says it in their environment:
https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process that trains alone; :class:`lightning_modules.process_group.Together` talks to others.

    All processes must call what is asked of all of them, in the same order: each waits for the others.

    :param rank: its number, from 0; only the first writes the job's record, its state and its exports.
    :param world: how many there are.
    :param local_rank: its number on its machine, which is that of its device.
    :param local_world: how many there are on its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether it speaks for all."""
        return self.rank == 0

    @property
    def leader(self) -> bool:
        """Whether it makes the files that the processes of its machine share."""
        return self.local_rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes of each value."""
        return list(values)

    def any(self, said: bool) -> bool:
        """Whether one of all processes says so."""
        return said

    def gathered(self, value: T) -> list[T]:
        """Return what each process has, by rank."""
        return [value]

    def told(self, value: T) -> T:
        """Return what the first process has."""
        return value

    def wait(self) -> None:
        """Wait until all processes are here."""

    @contextmanager
    def leaders_first(self) -> Iterator[None]:
        """Let the first process do something, then the other machines' leaders, then the rest.

        Each finds what was made before it, on its machine or on a disk that machines share.
        """
        turn = 0 if self.first else 1 if self.leader else 2
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(turn, 2):
            self.wait()


ALONE = Ranks()


def place_in(environment: Mapping[str, str]) -> Ranks:
    """Return which of how many processes this one is; alone where torchrun has not started it."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ALONE
    return Ranks(*(int(environment[name]) for name in names))
