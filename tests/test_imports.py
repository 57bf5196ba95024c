"""A new interpreter that loads plugin and DAGs has loaded nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "datasets",
    "torchao",
    "mlflow",
    "optuna",
    "matplotlib",
)

LOAD = {
    "plugin": "import post_training_plugin",
    "dags": "import runpy; [runpy.run_path(str(path)) for path in sorted(Path('dags').glob('*.py'))]",
    "provider": "from post_training.get_provider_info import get_provider_info; get_provider_info()",
}


@pytest.mark.parametrize("what", LOAD)
def test_nothing_heavy_is_imported(what: str) -> None:
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'plugins')\n"
        f"{LOAD[what]}\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_plugin_builds_nothing_before_a_request() -> None:
    program = (
        "import sys; sys.path.insert(0, 'plugins')\n"
        "import post_training_plugin\n"
        "ours = {name for name in sys.modules if name.startswith('post_training.')}\n"
        # Airflow itself reads the provider's description when it reads its configuration.
        "print(ours - {'post_training.get_provider_info', 'post_training.listener'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "set()"
