"""A job's tables as files in its folder, in the form in which MLflow's pages show them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

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


def upload_tables(client: MlflowClient, run_id: str, folder: Path, names: Sequence[str]) -> None:
    """Upload tables as they are now, and list them in the tag by which MLflow's page knows tables.

    :param folder: of their files.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS  # noqa: PLC0415 - seconds, where there are none

    for name in names:
        client.log_artifact(run_id, str(folder / name))
    listed = json.loads(client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
    new = [entry for name in names if (entry := {"path": name, "type": "table"}) not in listed]
    if new:
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps(listed + new))


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
