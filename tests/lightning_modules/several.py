"""One of several processes that train jobs together, one job after the other.

``python -m tests.lightning_modules.several SPEC[@STEP]...``, started with torchrun's environment. A job with
a step is asked to stop there. One that fails ends the process.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import cast

import torch

from lightning_modules.job import prepare_job
from lightning_modules.process import StopRequestedError, log_plainly, quieten_libraries
from lightning_modules.process_group import joined
from lightning_modules.ranks import Ranks, place_in
from lightning_modules.record import JobRecord, open_record
from lightning_modules.silent_record import SilentRecord
from post_training.schemas.trainer import TrainerSpec


def train(spec: TrainerSpec, ranks: Ranks, stop_at: int | None = None) -> None:
    """Train one job.

    :param stop_at: optimizer step at which the last of the processes is asked to stop; None is none.
    """
    record = open_record(spec) if ranks.first else cast(JobRecord, SilentRecord())

    def asked() -> bool:
        last = ranks.rank + 1 == ranks.world
        return stop_at is not None and last and job.module.optimizer_steps >= stop_at

    job = prepare_job(spec, record, should_stop=lambda: asked(), ranks=ranks)
    with suppress(StopRequestedError) if stop_at is not None else nullcontext():
        job.run()
    record.close()


def main() -> None:
    """Train what the command line says."""
    torch.set_num_threads(1)
    log_plainly()
    quieten_libraries()
    with joined(place_in(os.environ)) as ranks:
        for argument in sys.argv[1:]:
            name, _, stop_at = argument.partition("@")
            spec = TrainerSpec.model_validate_json(Path(name).read_bytes())
            train(spec, ranks, int(stop_at) if stop_at else None)


if __name__ == "__main__":
    main()
