"""What a job's folder holds of the attempts before: their state, if it is of this very training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from lightning_modules.checkpoint import EXPORTS, RESUME_FILE, remove_exports
from post_training.schemas.trainer import TrainerSpec

log = logging.getLogger(__name__)

INPUTS_FILE = Path("resume", "inputs.json")
REFERENCES_FILE = Path("resume", "references.safetensors")


def continues(spec: TrainerSpec, digests: list[str]) -> bool:
    """Whether the job's folder holds the state of this very training, or none; another's is removed.

    A job whose data changed between two attempts trains from the start, as it would have without the first.

    :param digests: of the data that was read.
    """
    inputs = spec.work_dir / INPUTS_FILE
    if not inputs.exists() or inputs.read_text() == _inputs(spec, digests):
        return True
    log.warning("the data or the request changed since the last attempt: training from the start")
    for state in (RESUME_FILE, REFERENCES_FILE):
        (spec.work_dir / state).unlink(missing_ok=True)
    for folder in filter(None, (spec.work_dir / EXPORTS, spec.checkpoint_dir)):
        remove_exports(folder)
    return False


def keep_inputs(spec: TrainerSpec, digests: list[str]) -> None:
    """Say whose state the folder holds from here on; not before the record forgot another's."""
    inputs = spec.work_dir / INPUTS_FILE
    inputs.parent.mkdir(parents=True, exist_ok=True)
    inputs.write_text(_inputs(spec, digests))


def _inputs(spec: TrainerSpec, digests: list[str]) -> str:
    request = spec.request.model_dump(mode="json", exclude={"job_uuid"})
    return json.dumps({"request": request, "model": spec.model, "data": digests}, sort_keys=True)
