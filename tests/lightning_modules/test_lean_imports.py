"""What a trainer imports, and what it does without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lightning_modules.tiny import LORA

ROOT = Path(__file__).resolve().parents[2]
PICTURES = "matplotlib when trained"

LOADED = """
import json
import pathlib
import sys
from lightning_modules.train import main

def watch(event, details):
    if event == "import" and details[0] == "matplotlib":
        trained = any(pathlib.Path(sys.argv[2]).rglob("adapter_model.safetensors"))
        loaded.add(f"matplotlib {'when' if trained else 'before it has'} trained")

loaded = set()
sys.addaudithook(watch)
status = main([sys.argv[1]])
names = {"bitsandbytes", "scipy", "mlflow", "datasets", "pyarrow"}
loaded |= {name for name in names if sys.modules.get(name) is not None}
print(json.dumps([status, sorted(loaded)]))
"""


@pytest.mark.parametrize("quantized", [False, True])
def test_a_trainer_imports_what_its_job_uses(quantized: bool, make_spec: Any, tmp_path: Path) -> None:
    spec = make_spec(
        algorithm=LORA | {"quantize_base": quantized},
        training={"max_validation_steps": 1},
        logger={"log_figures": True},
    )
    file = tmp_path / "spec.json"
    file.write_text(spec.model_dump_json())
    answer = subprocess.run(
        [sys.executable, "-c", LOADED, str(file), str(spec.work_dir)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")])},
        capture_output=True,
        text=True,
        check=True,
    )
    status, loaded = json.loads(answer.stdout.splitlines()[-1])
    assert status == 0, answer.stderr
    assert loaded == [*(["bitsandbytes"] if quantized else []), PICTURES, *(["scipy"] if quantized else [])]
