"""The nodes that a job on a Ray cluster takes, its folder there, and why a round of training has ended."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from post_training.errors import HardwareError, TrainerError
from post_training.schemas.trainer import CACHE_FOLDER, TrainerResult, TrainerSpec
from post_training.schemas.training import RuntimeConfig

KINDS = {"GPU": "GPUs", "CPU": "CPU cores"}
"""Ray's name for a device, and people's."""

HOME = "POST_TRAINING_HOME"
"""Environment variable of a node: the folder for jobs' working files."""

LOOK_SECONDS = 2.0
"""Between two looks for nodes."""

CHECK_LOOKS = 8
"""Between two questions whether a job that waits for nodes is still wanted."""

MAX_REASON = 500
"""Characters of what Ray says."""

SILENT = "Ray does not say why"


@dataclass(frozen=True)
class Node:
    """A node that is alive.

    :param there: its devices.
    :param free: those of them that nobody uses.
    """

    node_id: str
    there: float
    free: float


def chosen(nodes: Sequence[Node], wanted: RuntimeConfig, job: str) -> list[str] | None:
    """Return the nodes that a job takes; None while others use those that it could.

    :param job: its name: jobs that look at the same time prefer different nodes.
    """
    free = [node.node_id for node in nodes if node.free >= wanted.devices]
    free.sort(key=lambda node_id: sha256(f"{job} {node_id}".encode()).digest())
    return free[: wanted.num_nodes] if len(free) >= wanted.num_nodes else None


def too_few(nodes: Sequence[Node], kind: str, wanted: RuntimeConfig) -> str | None:
    """Say what the cluster lacks, field, rule and value; None where it lacks nothing."""
    fitting = sum(node.there >= wanted.devices for node in nodes)
    if fitting >= wanted.num_nodes:
        return None
    if fitting == 0:
        largest = int(max((node.there for node in nodes), default=0))
        rule = (
            f"runtime.devices must be at most {largest}, the {KINDS[kind]} of the Ray cluster's largest node"
        )
        return f"{rule}, got {wanted.devices}"
    rule = f"runtime.num_nodes must be at most {fitting}, the Ray cluster's nodes with {wanted.devices}"
    return f"{rule} {KINDS[kind]}, got {wanted.num_nodes}"


def wait_for_nodes(
    spec: TrainerSpec,
    look: Callable[[], tuple[list[Node], str]],
    check: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Return the nodes that a job takes; wait while others use them, and a while for those that are missing.

    :param look: returns the nodes that are alive, and Ray's name for a device there.
    :param check: asked now and then whether somebody still wants the job.
    :raises HardwareError: if they do not appear.
    :raises TrainerError: the same for a training that has begun: it had them.
    :raises SupersededError: what ``check`` raises where nobody does.
    """
    wanted = spec.request.runtime or RuntimeConfig()
    complete, looks = clock(), 0
    while True:
        nodes, kind = look()
        if (found := chosen(nodes, wanted, spec.request.job_uuid)) is not None:
            return found
        missing = too_few(nodes, kind, wanted)
        if missing is None:
            complete = clock()
        elif clock() - complete > spec.node_patience:
            missing = f"{missing}; more were waited for {spec.node_patience:g} s"
            if spec.begun:
                raise TrainerError(f"nodes were lost while it trained: {missing}")
            raise HardwareError(missing)
        looks += 1
        if looks % CHECK_LOOKS == 0:
            check()
        pause(LOOK_SECONDS)


class FailedWorkerError(Exception):
    """How an attempt ended in one of its processes, in a form that travels to the driver.

    :param result: JSON of a ``TrainerResult``.
    :param at: seconds since the epoch: what fails first is why the others fail.
    :param cut_off: whether it only says that another process is heard no more.
    """

    def __init__(self, result: str, at: float, cut_off: bool = False) -> None:
        super().__init__(result, at, cut_off)
        self.result, self.at, self.cut_off = result, at, cut_off


@dataclass(frozen=True)
class Round:
    """How a round of training has ended.

    :param result: of the job; None where it was stopped.
    :param lost: whether that is so because a process was lost or none began: another round may do better.
    """

    result: TrainerResult | None
    lost: bool = False


def why_ended(failures: Mapping[int, BaseException], otherwise: str) -> Round:
    """Return how a round ended that has failed.

    What no other round could mend comes first, then a process that is lost, then the first error. An error
    that only says that another process is heard no more tells of a lost one that Ray has not missed yet.

    :param failures: of processes, by rank.
    :param otherwise: why, where no process has failed.
    """
    told = {rank: error for rank, error in failures.items() if isinstance(error, FailedWorkerError)}
    by_time = sorted(told.values(), key=lambda error: error.at)
    results = [(TrainerResult.model_validate_json(error.result), error.cut_off) for error in by_time]
    for result, _ in results:
        if result.permanent or result.status != "failed":
            return Round(result)
    if lost := sorted(failures.keys() - told.keys()):
        first_line = next(iter(str(failures[lost[0]]).strip().splitlines()), SILENT)
        return _lost(f"process {lost[0]} was lost: {first_line}")
    for result, cut_off in results:
        if not cut_off:
            return Round(result)
    if results:
        return _lost(f"a process was lost: {results[0][0].error}")
    reason = " ".join(otherwise.split())[:MAX_REASON] or SILENT  # Ray's first line does not say it
    return _lost(f"the processes did not start: {reason}")


def _lost(error: str) -> Round:
    return Round(TrainerResult(status="failed", error=error), lost=True)


def train_in_rounds(
    spec: TrainerSpec, train: Callable[[TrainerSpec], Round], check: Callable[[], None], restarts: int
) -> TrainerResult | None:
    """Train in rounds until one is not lost; return the result of the last, None where it was stopped.

    :param train: trains one round.
    :param check: asked after a lost one whether somebody still wants the job.
    :param restarts: rounds after the first.
    :raises SupersededError: what ``check`` raises where nobody does.
    """
    ended = train(spec)
    for left in reversed(range(restarts)):
        if not ended.lost or ended.result is None:
            break
        check()
        print(
            f"{ended.result.error}; begun again from the newest state, {left} restarts are left", flush=True
        )
        ended = train(spec.model_copy(update={"begun": True}))
    return ended.result


def home() -> Path:
    """Return the folder of this node for jobs' working files."""
    given = os.environ.get(HOME)
    return Path(given) if given else Path.home() / ".cache" / "post_training"


def placed(spec: TrainerSpec, folder: Path, node_id: str) -> TrainerSpec:
    """Return a spec with folders of a node instead of those of the worker that wrote it.

    The job's is that of one attempt on one node: others may write to the same disk. Rounds share it.

    :param folder: the node's, for jobs' working files.
    """
    work_dir = _attempts(spec, folder) / spec.attempt_id / node_id
    return spec.model_copy(update={"work_dir": work_dir, "cache_dir": folder / CACHE_FOLDER})


def _attempts(spec: TrainerSpec, folder: Path) -> Path:
    job = spec.tracking.run_id if spec.tracking is not None else spec.request.job_uuid
    return folder / "ray" / job


def make_folder(spec: TrainerSpec, folder: Path) -> None:
    """Make a placed spec's folder, and remove what older attempts have left: the newest alone goes on."""
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    for attempt in _attempts(spec, folder).iterdir():
        if attempt.name < spec.attempt_id:
            shutil.rmtree(attempt, ignore_errors=True)


def remove_folder(work_dir: Path) -> None:
    """Remove a placed spec's folder: what is worth keeping is in MLflow."""
    shutil.rmtree(work_dir, ignore_errors=True)
    with suppress(OSError):  # other nodes have theirs there, where they share the disk
        work_dir.parent.rmdir()
        work_dir.parent.parent.rmdir()


def remove_left(spec: str, node_id: str) -> None:
    """Remove what an attempt has left on this node.

    :param spec: JSON of its ``TrainerSpec``, as the worker wrote it.
    """
    remove_folder(placed(TrainerSpec.model_validate_json(spec), home(), node_id).work_dir)
