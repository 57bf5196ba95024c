"""``python -m tests.chaos --jobs 50 --kills 100 --seed 1``: exit code 1 if a check fails."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from tempfile import mkdtemp

from rich.console import Console

from tests.chaos.report import faults, figures, show
from tests.chaos.run import Options, run


def main() -> int:
    """Run, print the table, and keep the home of a run that failed."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="chooses the strikes, cancels and moments")
    parser.add_argument("--parallel", type=int, default=3, help="jobs that train at the same time")
    parser.add_argument("--every", type=float, default=15.0, help="mean seconds between two strikes")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of an epoch")
    parser.add_argument("--json", type=Path, help="file that receives the figures")
    arguments = vars(parser.parse_args())
    file = arguments.pop("json")
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    logging.getLogger("httpx").setLevel(logging.WARNING)
    console, home = Console(width=None if sys.stdout.isatty() else 160), Path(mkdtemp(prefix="chaos-"))
    console.print(f"home {home}", highlight=False, soft_wrap=True)
    found = figures(run(Options(**arguments), home, console))
    if file:
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    show(found, console)
    return 1 if faults(found) else 0


if __name__ == "__main__":
    sys.exit(main())
