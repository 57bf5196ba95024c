"""What a trainer imports, and what it does without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lightning_modules.tiny import LORA

ROOT = Path(__file__).resolve().parents[2]

LOADED = """
import sys
from lightning_modules.train import main
status = main([sys.argv[1]])
names = ("bitsandbytes", "scipy", "matplotlib", "mlflow", "datasets", "pyarrow", "fsspec", "torch._inductor")
print("loaded", status, *(name for name in names if sys.modules.get(name) is not None))
"""


@pytest.mark.parametrize("quantized", [False, True])
def test_a_trainer_imports_what_its_job_uses(quantized: bool, make_spec: Any, tmp_path: Path) -> None:
    spec = make_spec(algorithm=LORA | {"quantize_base": quantized}, training={"max_validation_steps": 1})
    file = tmp_path / "spec.json"
    file.write_text(spec.model_dump_json())
    answer = subprocess.run(
        [sys.executable, "-c", LOADED, str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")])},
        capture_output=True,
        text=True,
        check=True,
    )
    status, *loaded = answer.stdout.splitlines()[-1].split()[1:]
    assert status == "0", answer.stderr
    assert ("bitsandbytes" in loaded, "scipy" in loaded) == (quantized, quantized)
    assert not {"matplotlib", "mlflow", "datasets", "pyarrow"} & set(loaded)
