"""The run of a task's job, written by an attempt that may not be the only one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from post_training.job_ids import TaskKey
from post_training.operators.task_record import TaskRecord
from post_training.record import identity_tags
from tests.fakes import FakeTracking

KEY = TaskKey("supervised_fine_tune", "job-1", "train")
OLDER, OWN, NEWER = "0199-a", "0199-b", "0199-c"


@dataclass
class Attempt:
    """What a record reads of the running task instance."""

    id: str = OWN
    try_number: int = 1
    max_tries: int = 5


@pytest.mark.parametrize(("cancelled", "status"), [(OLDER, "FINISHED"), (OWN, "KILLED"), (NEWER, "KILLED")])
def test_an_attempt_that_ends_after_a_cancel_leaves_the_job_cancelled(cancelled: str, status: str) -> None:
    """A task that is cleared while it runs has a new attempt before the old one has ended."""
    tracking = FakeTracking()
    tags = identity_tags(KEY) | {
        "post_training.attempt_id": OWN,
        "post_training.cancelled_attempt": cancelled,
    }
    run = tracking.create_run(name="", experiment=None, tags=tags, params={}, request={})
    tracking.set_status(run.run_id, "KILLED")
    record = TaskRecord(tracking, KEY, Attempt(), run=run)  # type: ignore[arg-type]
    record.conclude("FINISHED")
    assert tracking.runs[run.run_id].status == status
