"""The nodes that a job on a Ray cluster takes, and why a round of training on them has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from post_training.schemas.trainer import CACHE_FOLDER, TrainerResult, TrainerSpec
from post_training.schemas.training import RuntimeConfig

KINDS = {"GPU": "GPUs", "CPU": "CPU cores"}
"""Ray's name for a device, and people's."""

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


class FailedWorkerError(Exception):
    """How an attempt ended in one of its processes, in a form that travels to the driver.

    :param result: JSON of a ``TrainerResult``.
    :param at: seconds since the epoch: what fails first is why the others fail.
    """

    def __init__(self, result: str, at: float) -> None:
        super().__init__(result, at)
        self.result, self.at = result, at


def why_ended(failures: Mapping[int, BaseException], otherwise: str) -> TrainerResult:
    """Return how a round ended that has failed.

    What no other round could mend comes first. Else a process that is lost is the reason: the others only see
    that they hear nothing of it.

    :param failures: of processes, by rank.
    :param otherwise: why, where no process has failed.
    """
    told = {rank: error for rank, error in failures.items() if isinstance(error, FailedWorkerError)}
    by_time = sorted(told.values(), key=lambda error: error.at)
    results = [TrainerResult.model_validate_json(error.result) for error in by_time]
    final = [result for result in results if result.permanent or result.status != "failed"]
    lost = sorted(failures.keys() - told.keys())
    if final:
        return final[0]
    if results and not lost:
        return results[0]
    if lost:
        first_line = next(iter(str(failures[lost[0]]).strip().splitlines()), SILENT)
        return TrainerResult(status="failed", error=f"process {lost[0]} was lost: {first_line}")
    reason = " ".join(otherwise.split())[:MAX_REASON] or SILENT  # Ray's first line does not say it
    return TrainerResult(status="failed", error=f"the processes did not start: {reason}")


def placed(spec: TrainerSpec, folder: Path) -> TrainerSpec:
    """Return a spec with folders of a node instead of those of the worker that wrote it.

    :param folder: the node's, for jobs' working files.
    """
    job = spec.tracking.run_id if spec.tracking is not None else spec.request.job_uuid
    folders: dict[str, Any] = {"work_dir": folder / "ray" / job, "cache_dir": folder / CACHE_FOLDER}
    return spec.model_copy(update=folders)
