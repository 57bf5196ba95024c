"""The trainer process: ``python -m lightning_modules.train /path/to/spec.json``.

Exit codes: 0 completed, 1 failed (the reason is in ``result.json``), 143 stopped by SIGTERM.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from threading import Event

from pydantic import ValidationError

from post_training.errors import (
    DataError,
    DivergenceError,
    HardwareError,
    InvalidRequestError,
    ModelError,
    PostTrainingError,
)
from post_training.schemas.record import TAG_RESOURCES
from post_training.schemas.trainer import RESULT_FILE, TrainerResult, TrainerSpec

EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED = 0, 1, 143
PROGRESS_SECONDS = 5.0
PERMANENT_ERRORS = (
    DataError,
    ModelError,
    HardwareError,
    DivergenceError,
    InvalidRequestError,
    ValidationError,
    NotADirectoryError,
    PermissionError,
)

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Train what a spec file describes; return the process's exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m lightning_modules.train SPEC.json", file=sys.stderr)
        return EXIT_FAILED
    path = Path(arguments[0])
    result_file = path.parent / RESULT_FILE
    stop = Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: stop.set())
    try:
        spec = TrainerSpec.model_validate_json(path.read_bytes())
        result_file = spec.work_dir / RESULT_FILE
        result_file.unlink(missing_ok=True)  # an earlier attempt's
        result = _train(spec, stop)
    except Exception as error:
        if not stop.is_set():
            failed = TrainerResult(status="failed", error=describe(error), permanent=is_permanent(error))
            write_result(result_file, failed)
            return EXIT_FAILED
        result = None
    if stop.is_set() or result is None:
        print("stopped by SIGTERM", file=sys.stderr)
        return EXIT_STOPPED
    write_result(result_file, result)
    return EXIT_COMPLETED


def _train(spec: TrainerSpec, stop: Event) -> TrainerResult:
    _log_plainly()
    # Seconds of imports: a spec that cannot be read must not wait for them.
    from lightning_modules.callbacks import Progress, Resources  # noqa: PLC0415
    from lightning_modules.job import prepare_job  # noqa: PLC0415
    from lightning_modules.record import open_record  # noqa: PLC0415

    _quieten_libraries()
    record = open_record(spec)
    resources = Resources()
    try:
        job = prepare_job(spec, record, [Progress(PROGRESS_SECONDS), resources], stop.is_set)
        finished = job.run()
    finally:
        record.set_tag(TAG_RESOURCES, json.dumps(resources.summary()))
        record.close()
    return TrainerResult(
        status="completed",
        checkpoints=finished.checkpoints,
        metrics=finished.metrics,
        resources=resources.summary(),
    )


def describe(error: Exception) -> str:
    """Reduce an error to one sentence; print the traceback of one that nobody foresaw."""
    if isinstance(error, PostTrainingError):
        return " ".join(str(error).split())
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"the spec is invalid: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    if not isinstance(error, FileNotFoundError):
        traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def is_permanent(error: Exception) -> bool:
    """Whether another attempt would fail the same way: not so where a network or disk may have failed."""
    return isinstance(error, PERMANENT_ERRORS) and not isinstance(error.__cause__, OSError)


def write_result(path: Path, result: TrainerResult) -> None:
    """Write the result complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(result.model_dump_json(indent=2))
    os.replace(temporary, path)
    if result.error:
        print(f"failed: {result.error}", file=sys.stderr)


def _log_plainly() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
    # of kernels for other machines or that are not used here, and of each other
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")


def _quieten_libraries() -> None:
    """Hide advice, and what libraries say to each other; not what they say of our use of them."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()  # ours would print each line again
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"transformers|peft|lightning\.")


if __name__ == "__main__":
    sys.exit(main())
