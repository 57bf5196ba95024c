"""The time to the first step, of real trainers on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import startup
from tests.mlflow_server import MLflowServer
from tests.tiny_model import write_tiny_model


@pytest.mark.system
def test_a_step_begins_before_it_ends(
    tmp_path: Path, mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "STARTS", 1)
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(8)]
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = write_tiny_model(tmp_path / "model")
    found = startup.start_up(model, tmp_path, mlflow_server.uri, tmp_path / "starts")
    assert 0 < found["begins"] < found["ends"]
