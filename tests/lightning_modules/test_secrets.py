"""The key of a signed address: the trainer uses it and writes it nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from post_training.schemas.trainer import RESULT_FILE, SPEC_FILE, TrainerResult

ROOT = Path(__file__).parents[2]


def test_the_key_is_in_no_log_and_no_result(make_spec: Any) -> None:
    signed = "https://127.0.0.1:1/rows.jsonl?X-Amz-Signature=SECRET"
    spec = make_spec(data={"dataset_id": signed}, train_data=signed)
    (spec.work_dir / SPEC_FILE).write_text(spec.model_dump_json(exclude_unset=True))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_modules.train", str(spec.work_dir / SPEC_FILE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    result = TrainerResult.model_validate_json((spec.work_dir / RESULT_FILE).read_bytes())
    assert result.error is not None
    assert "https://127.0.0.1:1/rows.jsonl" in result.error
    assert "rows.jsonl" in done.stdout + done.stderr
    left = [file for file in spec.work_dir.rglob("*") if file.is_file() and b"SECRET" in file.read_bytes()]
    assert left == [spec.work_dir / SPEC_FILE]
    assert "SECRET" not in done.stdout + done.stderr
