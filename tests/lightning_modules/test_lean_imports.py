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
        trained = any(pathlib.Path(sys.argv[2]).rglob("*model.safetensors"))
        loaded.add(f"matplotlib {'when' if trained else 'before it has'} trained")

loaded = set()
sys.addaudithook(watch)
status = main([sys.argv[1]])
names = {"bitsandbytes", "scipy", "torchao", "mlflow", "datasets", "pyarrow"}
loaded |= {name for name in names if sys.modules.get(name) is not None}
print(json.dumps([status, sorted(loaded)]))
"""


@pytest.mark.parametrize(
    ("algorithm", "used"),
    [
        (LORA, []),
        (LORA | {"quantize_base": True}, ["bitsandbytes", "scipy", "torchao"]),
        ({"type": "QAT", "quantizer_name": "int4_weight_only", "group_size": 8}, ["torchao"]),
    ],
    ids=["LoRA", "QLoRA", "QAT"],
)
def test_a_trainer_imports_what_its_job_uses(
    algorithm: dict[str, Any], used: list[str], make_spec: Any, tmp_path: Path
) -> None:
    spec = make_spec(
        algorithm=algorithm,
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
    assert loaded == sorted([*used, PICTURES])
