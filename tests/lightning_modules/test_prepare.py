"""The process that prepares a retraining's data, and what it leaves in MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import list_artifacts

from lightning_modules.prepare import main
from post_training.schemas.preparation import (
    PREPARATION_RESULT_FILE,
    PREPARATION_SPEC_FILE,
    PreparationResult,
    PreparationSpec,
)

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer

TRAIN_ON_ALL = {"validation_fraction": 0.0, "evaluation_fraction": 0.0}


def write_spec(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {
        "source": str(folder / "rows.jsonl"),
        "method": "supervised_fine_tune",
        "data_format": "instruct",
    }
    spec = PreparationSpec.model_validate(
        {"split": TRAIN_ON_ALL, "sources": {"rows": source}, "work_dir": folder} | fields
    )
    (folder / PREPARATION_SPEC_FILE).write_text(spec.model_dump_json())
    return folder / PREPARATION_SPEC_FILE


def result_of(folder: Path) -> PreparationResult:
    return PreparationResult.model_validate_json((folder / PREPARATION_RESULT_FILE).read_bytes())


def rows(*numbers: int) -> list[dict[str, Any]]:
    return [{"question": f"{number}?", "answer": f"{number}!"} for number in numbers]


def test_the_second_night_goes_on_from_the_run_of_the_first(
    client: MlflowClient, server: MLflowServer, tmp_path: Path
) -> None:
    runs = [str(client.create_run("0").info.run_id) for _ in range(2)]
    trackings = [{"tracking_uri": server.uri, "run_id": run_id} for run_id in runs]
    first = write_spec(tmp_path / "first", rows(1, 2, 3), tracking=trackings[0])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_modules.prepare", str(first)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert result_of(first.parent).sources["rows"].new_rows == 3
    second = write_spec(
        tmp_path / "second",
        rows(2, 3, 4),
        trained=f"runs:/{runs[0]}/data/trained.digests",
        tracking=trackings[1],
        split=TRAIN_ON_ALL | {"rows": "new"},
    )
    for _ in range(2):  # a retry changes nothing
        assert main([str(second)]) == 0
        result = result_of(second.parent)
        assert result.status == "completed"
        assert result.sources["rows"].new_rows == 1
        files = {
            file.path
            for file in list_artifacts(run_id=runs[1], artifact_path="data", tracking_uri=server.uri)
        }
        assert files == {"data/rows.train.jsonl", "data/trained.digests"}
    uploaded = Path(client.download_artifacts(runs[1], "data", str(tmp_path)))
    assert json.loads((uploaded / "rows.train.jsonl").read_text()) == rows(4)[0]
    assert len((uploaded / "trained.digests").read_bytes()) == 2 * 4 * 16


def test_a_night_without_training_rows_leaves_digests_of_none(
    client: MlflowClient, run_id: str, server: MLflowServer, tmp_path: Path
) -> None:
    tracking = {"tracking_uri": server.uri, "run_id": run_id}
    everything_held_back = {"evaluation_fraction": 1 - 1e-9, "validation_fraction": 0.0}
    spec = write_spec(tmp_path / "one", rows(1), tracking=tracking, split=everything_held_back)
    assert main([str(spec)]) == 0
    trained = f"runs:/{run_id}/data/trained.digests"
    spec = write_spec(tmp_path / "two", rows(1), tracking=tracking, trained=trained)
    assert main([str(spec)]) == 0
    assert result_of(spec.parent).sources["rows"].new_rows == 1


@pytest.mark.parametrize("gone", ["artifact", "run"])
def test_digests_that_are_gone_from_mlflow_are_named_for_good(
    gone: str, run_id: str, server: MLflowServer, tmp_path: Path
) -> None:
    trained = f"runs:/{run_id if gone == 'artifact' else '0' * 32}/data/trained.digests"
    tracking = {"tracking_uri": server.uri, "run_id": run_id}
    assert main([str(write_spec(tmp_path, rows(1), trained=trained, tracking=tracking))]) == 1
    result = result_of(tmp_path)
    assert result.status == "failed"
    assert result.permanent
    assert result.error is not None
    assert result.error.startswith(f"cannot read the digests {trained} of what was trained on before: ")


def test_a_server_that_is_away_may_come_back(
    client: MlflowClient, run_id: str, server: MLflowServer, tmp_path: Path
) -> None:
    server.stop()
    tracking = {"tracking_uri": server.uri, "run_id": run_id}
    trained = f"runs:/{run_id}/data/trained.digests"
    for fields in ({"trained": trained}, {}):
        assert main([str(write_spec(tmp_path, rows(1), tracking=tracking, **fields))]) == 1
        assert result_of(tmp_path).status == "failed"
        assert not result_of(tmp_path).permanent


def test_a_failure_says_why_and_that_it_is_for_good(tmp_path: Path) -> None:
    assert main([str(write_spec(tmp_path, [*rows(1), {"question": "?"}]))]) == 1
    result = result_of(tmp_path)
    assert result.status == "failed"
    assert result.permanent
    assert result.error is not None
    assert "1 of 2 rows" in result.error
    assert "row 2" in result.error


def test_a_spec_that_cannot_be_read_is_a_failure_too(tmp_path: Path) -> None:
    spec = tmp_path / PREPARATION_SPEC_FILE
    spec.write_text('{"split": {"rows": "some"}}')
    assert main([str(spec)]) == 1
    assert result_of(tmp_path).permanent
    assert "the spec is invalid: split.rows" in (result_of(tmp_path).error or "")
    assert main([]) == 1
