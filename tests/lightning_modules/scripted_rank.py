"""A process of a job that does what a file beside its spec says, instead of training.

``python -m tests.lightning_modules.scripted_rank SPEC``, started by the launcher. The file ``script.json``
has an act for each rank:

- ``complete``, ``fail``: end with such a result,
- ``leave``: end as one that nobody wants any more,
- ``end``: end well without one, as all but the first do,
- ``die``: be killed,
- ``wait``: until it is killed, or asked to stop,
- ``wait deaf``: until it is killed.

``RANK.pid`` says that it runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from threading import Event

from lightning_modules.process import EXIT_COMPLETED, EXIT_FAILED
from lightning_modules.ranks import place_in
from lightning_modules.train import EXIT_STOPPED, Attempt, end_with_launcher
from post_training.schemas.trainer import TrainerResult, TrainerSpec


def main() -> int:
    """Act; return the exit code."""
    path = Path(sys.argv[1])
    attempt = Attempt(path.parent, place_in(os.environ))
    end_with_launcher()
    signal.signal(signal.SIGTERM, lambda *_: attempt.stop.set())
    attempt.spec = TrainerSpec.model_validate_json(path.read_bytes())
    rank = attempt.place.rank
    act = json.loads(path.with_name("script.json").read_text())[rank]
    (path.parent / f"{rank}.pid").write_text(str(os.getpid()))
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "complete":
        return attempt.leave(TrainerResult(status="completed"), EXIT_COMPLETED)
    if act == "fail":
        return attempt.leave(
            TrainerResult(status="failed", error=f"rank {rank}", permanent=True), EXIT_FAILED
        )
    if act == "leave":
        return EXIT_STOPPED
    if act.startswith("wait"):
        (Event() if act == "wait deaf" else attempt.stop).wait()
        return EXIT_STOPPED if attempt.place.first else EXIT_COMPLETED
    return EXIT_COMPLETED


if __name__ == "__main__":
    sys.exit(main())
