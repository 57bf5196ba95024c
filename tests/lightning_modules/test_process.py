"""What the processes of a worker share."""

from __future__ import annotations

import subprocess
import sys

WITH_IMPORTS = """
import gc
import sys
from lightning_modules.process import importing

try:
    with importing():
        assert not gc.isenabled()
        {imports}
except ModuleNotFoundError:
    pass
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 0
sys.modules["transformers"] = None
with importing():
    assert gc.isenabled()
assert gc.get_freeze_count() <= frozen
"""


def test_garbage_is_looked_for_again_after_the_imports_even_when_one_fails():
    for imports in ("import json", "import no_such_module"):
        script = WITH_IMPORTS.format(imports=imports)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
