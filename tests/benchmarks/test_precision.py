"""Rounding, seen on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import precision
from tests.tiny_model import write_tiny_model


def test_each_way_rounds_and_in_fp32_none_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path)
    rows = [{"question": f"What is {i}?", "answer": "It is" + " now" * i} for i in range(1, 4)]
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = precision.deviations(str(tmp_path), tmp_path)
    assert found.keys() == precision.WAYS.keys()
    for off in found.values():
        assert 0 < off["token"] < 0.05
        assert off["token"] < off["answer"] < 0.5
    exact = {name: (torch.float32, way) for name, (_, way) in precision.WAYS.items() if name != "TRL default"}
    monkeypatch.setattr(precision, "WAYS", exact)
    for off in precision.deviations(str(tmp_path), tmp_path).values():
        assert off["answer"] < 1e-4
