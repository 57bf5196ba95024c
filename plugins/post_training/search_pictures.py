"""Optuna's pictures of a search as files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from post_training.search import Search

logger = logging.getLogger(__name__)

HISTORY_FILE, IMPORTANCE_FILE = "optimization_history.png", "parameter_importances.png"


def draw(search: Search, folder: Path) -> list[Path]:
    """Draw the values of the trials in their order, and how much each field mattered; return the files.

    Where there is too little to compare, the second is left out; so is one that cannot be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization import matplotlib as pictures

    finished = [trial for trial in search.trials() if trial.state == "COMPLETE"]
    drawn: dict[str, Callable[..., Any]] = {}
    if finished:
        drawn[HISTORY_FILE] = pictures.plot_optimization_history
    if len(finished) > 1 and len(search.config.space) > 1 and len({trial.value for trial in finished}) > 1:
        drawn[IMPORTANCE_FILE] = pictures.plot_param_importances
    else:
        logger.info(
            "No picture of the fields' importance: it takes two of them, and two finished trials that differ."
        )
    saved = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for name, picture in drawn.items():
            try:
                saved.append(_save(picture(search.study), folder / name, search.config.metric))
            except Exception as error:  # whatever ails a library, what was trained counts
                logger.warning("The picture %s cannot be drawn: %s", name, error)
    return saved


def _save(axes: Any, file: Path, metric: str) -> Path:
    from matplotlib import pyplot

    if file.name == HISTORY_FILE:
        axes.set_ylabel(metric)
    axes.figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(axes.figure)
    return file
