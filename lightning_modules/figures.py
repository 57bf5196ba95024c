"""A job's pictures: curves by optimizer step, and distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.trained import rename_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = "figures"
"""Folder of the pictures, in the job's folder and among its run's artifacts."""

MARKED_POINTS = 30
"""Curves of no more points show each of them: one alone would not be seen."""

MAX_BINS = 40
LOGARITHMIC_FROM = 20.0
"""Ratio of the largest value to the smallest from which on the scale is logarithmic."""

Curve = Sequence[tuple[int, float]]
"""Optimizer steps and values, by step."""


def curves_figure(title: str, unit: str, curves: Mapping[str, Curve]) -> Figure | None:
    """Draw values by optimizer step; return None where there is none.

    :param unit: of the values, for their axis.
    :param curves: by what the legend calls them.
    """
    there = {name: curve for name, curve in curves.items() if curve}
    if not there:
        return None
    figure, axes = _figure(title, "optimizer step", unit)
    for name, curve in there.items():
        axes.plot(*zip(*curve, strict=True), label=name, marker="." if len(curve) <= MARKED_POINTS else "")
    values = [value for curve in there.values() for _, value in curve]
    if min(values) > 0 and max(values) / min(values) > LOGARITHMIC_FROM:
        axes.set_yscale("log")
    if len(there) > 1:
        axes.legend()
    return figure


def distributions_figure(
    title: str,
    unit: str,
    counted: str,
    distributions: Mapping[str, Sequence[float]],
    mark: tuple[str, float],
) -> Figure | None:
    """Draw how often values occur, all distributions in the same bins; return None where there is no value.

    :param unit: of the values.
    :param counted: what has a value each, in the plural.
    :param distributions: the values by what the legend calls them.
    :param mark: name of a value that the picture marks, and the value.
    """
    there = {name: values for name, values in distributions.items() if values}
    if not there:
        return None
    figure, axes = _figure(title, unit, counted)
    bins = min(MAX_BINS, 5 + 2 * math.isqrt(max(map(len, there.values()))))
    axes.hist(list(there.values()), bins=bins, label=list(there))
    name, value = mark
    axes.axvline(value, color="black", linestyle="--", linewidth=1, label=name)
    axes.legend()
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write a picture as PNG, complete or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}")
    figure.savefig(draft, format="png", dpi=110)
    rename_whole(draft, file)


def _figure(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # noqa: PLC0415 - a second, at the end of a job

    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.12, right=0.97, top=0.91, bottom=0.13)
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    return figure, axes
