"""The evaluation process and what it leaves in MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import list_artifacts

from lightning_modules.evaluate import main
from post_training.schemas.evaluation import (
    EVALUATION_RESULT_FILE,
    EVALUATION_SPEC_FILE,
    EvaluationResult,
    EvaluationSpec,
    EvaluationValues,
)
from tests.lightning_modules.recorded import table_of


def write_spec(folder: Path, **fields: Any) -> Path:
    config = {"dataset_id": "rows", "dtype": "fp32", "exact_match": {"pattern": "x", "max_new_tokens": 4}}
    spec = EvaluationSpec.model_validate({"config": config, "work_dir": folder} | fields)
    (folder / EVALUATION_SPEC_FILE).write_text(spec.model_dump_json())
    return folder / EVALUATION_SPEC_FILE


def result_of(folder: Path) -> EvaluationResult:
    return EvaluationResult.model_validate_json((folder / EVALUATION_RESULT_FILE).read_bytes())


def test_metrics_tables_values_and_a_picture_are_in_the_run(
    client: MlflowClient, run_id: str, server: Any, tiny_model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    tracking = {"tracking_uri": server.uri, "run_id": run_id}
    models = {"base": str(tiny_model_dir), "again": str(tiny_model_dir)}
    spec = write_spec(tmp_path, models=models, data=str(rows_file), tracking=tracking)
    done = subprocess.run(
        [sys.executable, "-m", "lightning_modules.evaluate", str(spec)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert main([str(spec)]) == 0  # a retry changes nothing
    result = result_of(tmp_path)
    assert result.status == "completed"
    assert result.metrics["base"] == result.metrics["again"]
    run = client.get_run(run_id)
    for metric, value in result.metrics["base"].items():
        assert run.data.metrics[f"base/{metric}"] == value
    assert run.data.metrics["device_seconds"] > 0
    assert table_of(client, run_id, "evaluation.json")["model"] == ["base", "again"]
    samples = table_of(client, run_id, "samples.json")
    assert list(samples) == ["row", "question", "expected", "base", "again"]
    assert len(samples["row"]) == 10
    files = {file.path for file in list_artifacts(run_id=run_id, tracking_uri=server.uri)}
    assert files == {"evaluation.json", "samples.json", "values.json", "evaluation.png"}
    listed = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert [entry["path"] for entry in listed] == ["evaluation.json", "samples.json"]
    values = EvaluationValues.model_validate_json(
        Path(client.download_artifacts(run_id, "values.json")).read_bytes()
    )
    assert values.models["base"].metrics() == result.metrics["base"]
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_a_failure_says_why_and_whether_it_is_for_good(tiny_model_dir: Path, tmp_path: Path) -> None:
    models = {"base": str(tiny_model_dir)}
    (tmp_path / "rows.jsonl").write_text('{"question": "?"}\n')
    assert main([str(write_spec(tmp_path, models=models, data=str(tmp_path / "rows.jsonl")))]) == 1
    result = result_of(tmp_path)
    assert result.status == "failed"
    assert result.permanent
    assert result.error is not None
    assert "row 1" in result.error
