"""Means of values that arrive in sums, and values that are kept one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_modules.ranks import Ranks

MAX_PERPLEXITY_LOG = 700.0
"""exp of more is infinite in a double, and an infinity cannot be stored in the record."""


class Means:
    """Running means by name; tensors stay where they are until a mean is asked for."""

    def __init__(self, sums: Iterable[tuple[str, float, int]] = ()) -> None:
        self._sums: dict[str, tuple[Tensor | float, int]] = {n: (total, count) for n, total, count in sums}

    def add(self, name: str, total: Tensor | float, count: int) -> None:
        """Add a sum of so many values."""
        before, counted = self._sums.get(name, (0.0, 0))
        self._sums[name] = (before + total, counted + count)

    def mean(self, name: str) -> float:
        """Return the mean so far; not a number before the first value."""
        total, count = self._sums.get(name, (0.0, 0))
        return float(total) / count if count else math.nan

    def all(self) -> dict[str, float]:
        """Return every mean by its name."""
        return {name: self.mean(name) for name in self._sums}

    def of_all(self, ranks: Ranks) -> Means:
        """Return the means of what all processes have added, in the same order of names."""
        if ranks.world == 1:
            return self
        own = self.sums()
        total = ranks.sums([value for _, total, count in own for value in (total, count)])
        return Means((name, total[2 * i], round(total[2 * i + 1])) for i, (name, _, _) in enumerate(own))

    def sums(self) -> list[tuple[str, float, int]]:
        """Return name, sum and count of each; ``Means(sums)`` goes on from there."""
        return [(name, float(total), count) for name, (total, count) in self._sums.items()]


class Values:
    """Single values by name, in the order of their arrival, kept on the CPU.

    :param there: those that came before (n).
    """

    def __init__(self, there: Mapping[str, Tensor] = {}) -> None:
        self._parts = {name: [values] for name, values in there.items()}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add values (b)."""
        for name, more in values.items():
            self._parts.setdefault(name, []).append(more.detach().float().cpu())

    def all(self) -> dict[str, Tensor]:
        """Return all values (n) by name."""
        self._parts = {name: [torch.cat(parts)] for name, parts in self._parts.items()}
        return {name: values for name, [values] in self._parts.items()}

    def of_all(self, ranks: Ranks) -> dict[str, Tensor]:
        """Return the values of all processes, by rank."""
        found = ranks.gathered(self.all())
        names = dict.fromkeys(name for values in found for name in values)
        return {name: torch.cat([values[name] for values in found if name in values]) for name in names}


def perplexity(nll: float) -> float:
    """Return exp of a mean negative log-probability, capped where it would be infinite."""
    return math.exp(min(nll, MAX_PERPLEXITY_LOG))
