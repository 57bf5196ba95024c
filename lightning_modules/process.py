"""What the processes of a worker share: exit codes, how they log, and how they tell an error."""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from post_training.errors import (
    DataError,
    DivergenceError,
    HardwareError,
    InvalidRequestError,
    ModelError,
    PostTrainingError,
)

EXIT_COMPLETED, EXIT_FAILED = 0, 1

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


class StopRequestedError(Exception):
    """The process was asked to stop; the optimizer step under way was dropped."""


def spec_file(module: str, argv: Sequence[str] | None) -> Path | None:
    """Return the one file that a process was given; None, and say how it is called, if it was not.

    :param argv: its arguments; None is those of the command line.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print(f"usage: python -m {module} SPEC.json", file=sys.stderr)
        return None
    return Path(arguments[0])


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


def log_plainly(level: int = logging.INFO) -> None:
    """Write what is logged to standard output, a line each.

    :param level: from which on it is written.
    """
    logging.basicConfig(level=level, stream=sys.stdout, format="%(levelname)s %(message)s")
    # of kernels for other machines or that are not used here, and of each other
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage meanwhile, nor ever after in what was imported: that is a fifth of the time.

    Where the libraries are there already, what is in memory is not theirs alone, and nothing is done.
    """
    if "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quieten_libraries() -> None:
    """Hide advice, and what libraries say to each other; not what they say of our use of them."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()  # ours would print each line again
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"transformers|peft|lightning\.")
