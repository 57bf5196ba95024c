"""What the pictures show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_modules.figures import curves_figure, distributions_figure, save


def axes_of(figure: Any) -> Any:
    (axes,) = figure.axes
    return axes


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_curve_is_its_points() -> None:
    axes = axes_of(
        curves_figure("Loss", "nats", {"training": [(1, 2.0), (3, 1.5)], "validation": [(3, 1.7)]})
    )
    training, validation = axes.lines
    assert training.get_xydata().tolist() == [[1, 2.0], [3, 1.5]]
    assert validation.get_xydata().tolist() == [[3, 1.7]]
    assert validation.get_marker() == "."
    assert legend_of(axes) == ["training", "validation"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("Loss", "optimizer step", "nats")


def test_what_has_no_point_is_no_curve() -> None:
    axes = axes_of(curves_figure("Loss", "nats", {"training": [(1, 2.0)], "validation": []}))
    assert len(axes.lines) == 1
    assert axes.get_legend() is None
    assert curves_figure("Loss", "nats", {"training": []}) is None


@pytest.mark.parametrize(
    ("values", "scale"),
    [((0.1, 1.9), "linear"), ((0.1, 2.1), "log"), ((0.0, 50.0), "linear"), ((-1.0, 50.0), "linear")],
)
def test_the_scale_is_logarithmic_for_large_ratios(values: tuple[float, float], scale: str) -> None:
    curve = list(enumerate(values))
    assert axes_of(curves_figure("Norm", "2-norm", {"norm": curve})).get_yscale() == scale


def test_many_points_are_a_line_alone() -> None:
    (line,) = axes_of(curves_figure("Loss", "nats", {"training": [(i, 1.0) for i in range(31)]})).lines
    assert line.get_marker() in ("", "None")


def test_a_distribution_counts_its_values() -> None:
    values = {"training": [1.0, 1.0, 2.0, 9.0], "validation": [], "other": [2.0, 9.0]}
    axes = axes_of(distributions_figure("Lengths", "tokens", "rows", values, ("cut at 9", 9.0)))
    first, second = axes.containers
    heights = [[bar.get_height() for bar in bars] for bars in (first, second)]
    edges = np.histogram_bin_edges([1.0, 9.0], bins=len(heights[0]))
    assert heights[0] == np.histogram([1.0, 1.0, 2.0, 9.0], edges)[0].tolist()
    assert heights[1] == np.histogram([2.0, 9.0], edges)[0].tolist()
    assert axes.lines[0].get_xdata() == [9.0, 9.0]
    assert sorted(legend_of(axes)) == ["cut at 9", "other", "training"]
    assert distributions_figure("Lengths", "tokens", "rows", {"training": []}, ("0", 0.0)) is None


def test_a_picture_is_a_file_that_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "figures" / "loss.png"
    sizes = []
    for curve in ([(1, 1.0)], [(1, 1.0), (2, 3.0), (3, 0.5)]):
        figure = curves_figure("Loss", "nats", {"training": curve})
        assert figure is not None
        save(figure, file)
        assert file.read_bytes().startswith(b"\x89PNG")
        sizes.append(file.stat().st_size)
    assert sizes[0] != sizes[1]
    assert list(file.parent.iterdir()) == [file]
