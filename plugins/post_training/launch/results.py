"""What a trainer process leaves for whoever started it."""

from __future__ import annotations

from post_training.errors import TrainerError
from post_training.schemas.trainer import RESULT_FILE, TrainerResult, TrainerSpec


def read_result(spec: TrainerSpec, code: int) -> TrainerResult:
    """Return the trainer's result.

    :param code: its exit code.
    :raises TrainerError: if it left none.
    """
    path = spec.work_dir / RESULT_FILE
    if path.exists():
        result = TrainerResult.model_validate_json(path.read_text(encoding="utf-8"))
        if result.attempt_id == spec.attempt_id:
            return result
    raise no_result(code)


def no_result(code: int) -> TrainerError:
    """Return the error of a process that left no result."""
    if code < 0:
        return TrainerError(f"The trainer was killed by signal {-code}; out of memory is a usual cause.")
    return TrainerError(f"The trainer ended with exit code {code} and no result.")
