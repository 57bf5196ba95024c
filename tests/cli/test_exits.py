"""Which code each error ends with, and what is said of it."""

from __future__ import annotations

import pytest

from post_training.cli.exits import ExitCode, exit_code_of, lines_of, object_of
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
    TrainerError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainerError("x"), 1),
        (InvalidRequestError.of("a", "b"), 2),
        (RequestTooLargeError("x"), 2),
        (JobNotFoundError("x"), 3),
        (DatasetNotFoundError("x"), 3),
        (JobConflictError("x"), 4),
        (RecordUnavailableError("x"), 5),
        (BusyError("x"), 5),
        (ForbiddenError("x"), 6),
    ],
)
def test_each_error_has_its_code(error: PostTrainingError, code: int) -> None:
    assert exit_code_of(error) == code


def test_codes_are_distinct_and_documented() -> None:
    import post_training.cli.exits as exits
    from post_training.cli.app import EPILOG

    assert len({code.value for code in ExitCode}) == len(ExitCode)
    for code in ExitCode:
        assert f"\n{code.value} " in (exits.__doc__ or "")
        assert f" {code.value} " in EPILOG


def test_a_request_s_errors_are_a_line_each() -> None:
    error = InvalidRequestError(
        [
            {"loc": ["training_config", "n_epochs"], "msg": "must be at least 1, got 0", "type": "x"},
            {"loc": [], "msg": "must be an object", "type": "x"},
        ]
    )
    assert lines_of(error) == [
        "training_config.n_epochs: must be at least 1, got 0",
        "request: must be an object",
    ]
    assert lines_of(JobConflictError("it has ended")) == ["error: it has ended"]
    assert object_of(error) == {
        "error": "training_config.n_epochs: must be at least 1, got 0; : must be an object",
        "errors": error.errors,
    }
    assert object_of(JobConflictError("it has ended")) == {"error": "it has ended"}
