"""How the command line ends.

====  ====================================================================================
code  meaning
====  ====================================================================================
0     done; of a job that was waited for: it completed
1     the job failed or was cancelled, or a check of ``doctor`` failed
2     wrong usage, or a request that breaks a rule: each is named with its field and value
3     there is no such job
4     a conflict: the job has ended, its id or folder belongs to another request, or servers
      run already
5     Airflow, MLflow or the servers do not answer
6     the login is refused, or the user may not do this
130   interrupted; ``run`` with the same folder goes on where it was
====  ====================================================================================
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from post_training.errors import (
    BusyError,
    DatasetNotFoundError,
    ForbiddenError,
    InvalidRequestError,
    JobConflictError,
    JobNotFoundError,
    PostTrainingError,
    RecordUnavailableError,
    RequestTooLargeError,
)


class ExitCode(IntEnum):
    """What a script can tell apart."""

    OK = 0
    FAILED = 1
    INVALID = 2
    NOT_FOUND = 3
    CONFLICT = 4
    UNAVAILABLE = 5
    FORBIDDEN = 6
    INTERRUPTED = 130


_CODES: dict[type[PostTrainingError], ExitCode] = {
    InvalidRequestError: ExitCode.INVALID,
    RequestTooLargeError: ExitCode.INVALID,
    JobNotFoundError: ExitCode.NOT_FOUND,
    DatasetNotFoundError: ExitCode.NOT_FOUND,
    JobConflictError: ExitCode.CONFLICT,
    RecordUnavailableError: ExitCode.UNAVAILABLE,
    BusyError: ExitCode.UNAVAILABLE,
    ForbiddenError: ExitCode.FORBIDDEN,
}


def exit_code_of(error: PostTrainingError) -> ExitCode:
    """Return the code that an error ends with; one of the training itself is a failed job's."""
    return _CODES.get(type(error), ExitCode.FAILED)


def lines_of(error: Exception) -> list[str]:
    """Return what is said of an error: of a request one line for each broken rule."""
    if not isinstance(error, InvalidRequestError):
        return [f"error: {error}"]
    return [f"{'.'.join(map(str, detail['loc'])) or 'request'}: {detail['msg']}" for detail in error.errors]


def object_of(error: Exception) -> dict[str, Any]:
    """Return what is said of an error as JSON: a sentence, and of a request its broken rules."""
    broken = {"errors": error.errors} if isinstance(error, InvalidRequestError) else {}
    return {"error": str(error), **broken}
