"""Every error that the provider raises on purpose.

::

    PostTrainingError
    ├── InvalidRequestError        400  a field breaks a rule; carries the list of (loc, msg, type)
    ├── JobNotFoundError           404
    ├── DatasetNotFoundError       404
    ├── ForbiddenError             403
    ├── JobConflictError           409  same job_uuid, another payload; or the job has already ended
    ├── RequestTooLargeError       413
    ├── RecordUnavailableError     503  MLflow or Airflow's database does not answer
    ├── BusyError                  503  the service has no place left for the call
    ├── DataError                       the data set cannot be read or has bad rows
    ├── ModelError                      the base model cannot be found, read or adapted
    ├── HardwareError                   the machine cannot do what was asked
    ├── DivergenceError                 the loss is no longer a finite number
    ├── TrainerError                    the trainer process ended without a result
    ├── ClusterUnavailableError         the Ray cluster does not answer, or refuses the call
    │   └── ClusterRefusesError             it would refuse the same call again: a wrong token, a bad address
    ├── InputsChangedError              data or model are no longer what the job's run was trained from
    └── SupersededError                 a newer attempt at the job runs: this one stops and writes nothing

The message of each is one sentence that may be shown to the caller.
"""

from __future__ import annotations

from typing import TypedDict


class ErrorDetail(TypedDict):
    """One broken rule, in pydantic's own shape."""

    loc: list[str | int]
    msg: str
    type: str


class PostTrainingError(Exception):
    """Base of the tree; its text is one sentence fit for a caller."""


class InvalidRequestError(PostTrainingError):
    """A request breaks a rule that can be known before any work starts.

    :param errors: one entry for each broken rule, the field's path in ``loc``.
    """

    def __init__(self, errors: list[ErrorDetail]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors))
        self.errors = errors

    @classmethod
    def of(cls, field: str, msg: str, type: str = "value_error") -> InvalidRequestError:
        """Make the error of one field, named by its dotted path."""
        return cls([{"loc": list(field.split(".")), "msg": msg, "type": type}])


class JobNotFoundError(PostTrainingError):
    """No job of this id exists, or the caller may not see it."""

    def __init__(self, job_uuid: str) -> None:
        super().__init__(f"no post-training job {job_uuid!r}")
        self.job_uuid = job_uuid


class DatasetNotFoundError(PostTrainingError):
    """No data set of this id, or no version of it with this digest, is registered."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"no data set {reference!r}")


class ForbiddenError(PostTrainingError):
    """The caller is known and may not do this."""


class JobConflictError(PostTrainingError):
    """The job's state, or another payload under its id, forbids the request."""


class RequestTooLargeError(PostTrainingError):
    """The request's body is larger than the limit."""


class RecordUnavailableError(PostTrainingError):
    """The job's record (MLflow or Airflow's database) does not answer."""


class BusyError(PostTrainingError):
    """The service does as much at once as it may; the call would have waited too long."""


class DataError(PostTrainingError):
    """The data set cannot be read, or its rows do not fit the format."""


class ModelError(PostTrainingError):
    """The base model cannot be found, read or adapted as asked."""


class HardwareError(PostTrainingError):
    """The machine cannot do what the request asks."""


class DivergenceError(PostTrainingError):
    """The loss is no longer a finite number."""


class TrainerError(PostTrainingError):
    """The trainer process ended without the result it owes."""


class ClusterUnavailableError(PostTrainingError):
    """The Ray cluster of the settings does not answer, or refuses what it is asked."""


class ClusterRefusesError(ClusterUnavailableError):
    """The same call would end the same way: the token or the address is wrong, or the call itself."""


class InputsChangedError(PostTrainingError):
    """Data or model are no longer what the job's run was trained from: another run is to hold what comes."""


class SupersededError(PostTrainingError):
    """A newer attempt at the job runs; whoever meets this stops and writes nothing more."""
