"""A job's tables as files in its folder, in the form in which MLflow's pages show them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

TABLES = "tables"
"""Folder of the tables in the job's folder."""


def write_table(work_dir: Path, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table in MLflow's form, complete or not at all; numbers that are not finite become null.

    Source: ``MlflowClient.log_table``, which writes pandas' JSON of orient "split" without an index.

    :param work_dir: the job's folder.
    """
    data = [[None if _is_not_finite(value) else value for value in row] for row in rows]
    file = work_dir / TABLES / name
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps({"columns": list(columns), "data": data}, default=str))
    draft.replace(file)


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
