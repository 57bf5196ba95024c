"""Trainers on the nodes of a Ray cluster: ``python -m lightning_modules.on_ray SPEC.json``, a job of Ray's.

Ray Train starts one process for each device, ``runtime.devices`` of them on each of ``runtime.num_nodes``
nodes, and joins them; what they do then is what torchrun's do. Where one is lost Ray Train ends the others,
and all are started again on the nodes that there are then. Nodes share no disk: the state is MLflow's.

Ray Train could begin again by itself (``FailureConfig``). It would wait for a node forever, and try again
what no other attempt can mend, so each round here is a run of Ray Train's that may not fail.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
from ray._private.state import available_resources_per_node
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import distributed

from lightning_modules.elastic import RESTARTS
from lightning_modules.fencing import watch_of
from lightning_modules.nodes import (
    FailedWorkerError,
    Node,
    Round,
    home,
    make_folder,
    placed,
    remove_folder,
    remove_left,
    train_in_rounds,
    wait_for_nodes,
    why_ended,
)
from lightning_modules.process import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    StopRequestedError,
    describe,
    is_permanent,
    spec_file,
)
from lightning_modules.process_group import TIMEOUT, lost_another
from lightning_modules.ranks import Ranks
from lightning_modules.train import EXIT_STOPPED, Attempt, failure_of, take_part
from post_training.errors import SupersededError
from post_training.schemas.trainer import RESULT_LINE, TrainerResult, TrainerSpec

STARTS = 10
"""How often nodes are looked for in one round, if others take them before it begins."""

CLEAR_SECONDS = 60.0
"""For which a job waits, at its end, for its files on the nodes to be removed."""

NODE_LABEL = "ray.io/node-id"


def main(argv: Sequence[str] | None = None) -> int:
    """Train what a spec file describes, and print the result for the log's readers; return the exit code."""
    path = spec_file("lightning_modules.on_ray", argv)
    if path is None:
        return EXIT_FAILED
    spec: TrainerSpec | None = None
    try:
        spec = TrainerSpec.model_validate_json(path.read_bytes())
        ray.init(address="auto", logging_level=logging.WARNING)
        result = train_on_nodes(spec)
    except SupersededError:
        result = None
    except Exception as error:
        result = TrainerResult(status="failed", error=describe(error), permanent=is_permanent(error))
    if result is None:
        print("cancelled, or a newer attempt runs", file=sys.stderr)
        return EXIT_STOPPED
    if result.error:
        print(f"failed: {result.error}", file=sys.stderr)
    signed = result.model_copy(update={"attempt_id": spec.attempt_id if spec is not None else ""})
    # In one piece, and in a line of its own: a thread of Ray's writes the processes' lines to the same file.
    sys.stdout.write(f"\n{RESULT_LINE}{signed.model_dump_json()}\n")
    sys.stdout.flush()
    return EXIT_COMPLETED if result.status == "completed" else EXIT_FAILED


def train_on_nodes(spec: TrainerSpec) -> TrainerResult | None:
    """Train in rounds until one is not lost; return the first process's result, None where it was stopped.

    :raises HardwareError: if the cluster has not as many devices.
    :raises TrainerError: if it has them no more.
    :raises SupersededError: if nobody wants the job any more.
    """
    rounds = Rounds(watch_of(spec))
    try:
        return train_in_rounds(spec, rounds.train, rounds.check, RESTARTS)
    finally:
        rounds.clear(spec)


class Rounds:
    """The rounds of a job, each on nodes that are free when it begins.

    :param check: raises SupersededError once nobody wants the job.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        self._left: set[str] = set()

    def train(self, spec: TrainerSpec) -> Round:
        """Train a round; others may take the nodes before it has begun.

        :raises HardwareError: if the cluster has not as many devices.
        :raises TrainerError: if it has them no more.
        :raises SupersededError: if nobody wants the job any more.
        """
        reason = ""
        for _ in range(STARTS):
            nodes = wait_for_nodes(spec, nodes_of_cluster, self.check)
            self._left.update(nodes)
            try:
                ended = _round(spec, nodes)
                if ended.result is None or ended.result.status == "completed":
                    self._left.difference_update(nodes)  # each process has removed what was on its node
                return ended
            except TrainingFailedError as error:
                reason = str(error)
                if not _was_late(error):
                    break
                print("the nodes were taken, or lost, before it began", flush=True)
        return why_ended({}, reason)

    def clear(self, spec: TrainerSpec) -> None:
        """Remove what rounds have left on nodes that are alive: other attempts go on from MLflow's state."""
        if not self._left:
            return
        with suppress(Exception):  # only space is lost, and the job's end is known
            alive = {node.node_id for node in nodes_of_cluster()[0]}
            remove, job = ray.remote(num_cpus=0)(remove_left), spec.model_dump_json()
            removals = [
                remove.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                    job, node
                )
                for node in alive & self._left
            ]
            ray.wait(removals, num_returns=len(removals), timeout=CLEAR_SECONDS)


def _was_late(error: TrainingFailedError) -> bool:
    """Whether a round did not begin because its processes got no devices."""
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    return isinstance(failure, WorkerGroupStartupTimeoutError | WorkerGroupStartupFailedError)


def _round(spec: TrainerSpec, nodes: Sequence[str]) -> Round:
    """Train on these nodes until all processes have ended.

    :raises TrainingFailedError: if they did not begin.
    """
    _, kind = nodes_of_cluster()
    scaling: dict[str, Any] = {
        "num_workers": len(nodes) * spec.request.devices,
        "use_gpu": kind == "GPU",
        "resources_per_worker": {kind: 1},
        "label_selector": [{NODE_LABEL: node} for node in nodes for _ in range(spec.request.devices)],
    }
    at_once: dict[str, Any] = {
        "max_failures": 0,
        "controller_failure_limit": 0,
        "max_preemption_failures": 0,
    }
    backend = "cpu:gloo,cuda:nccl" if kind == "GPU" else "gloo"
    with TemporaryDirectory(prefix="ray-train-", ignore_cleanup_errors=True) as storage:
        trainer = TorchTrainer(
            take_part_on_node,  # type: ignore[arg-type]  # it returns the run's value
            train_loop_config={"spec": spec.model_dump_json()},
            torch_config=TorchConfig(backend=backend, timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=ScalingConfig(**scaling),
            run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(**at_once)),
        )
        try:
            finished: Any = trainer.fit()  # whose types are those of Ray Train's first version
        except WorkerGroupError as error:
            failures = {rank: _cause(failure) for rank, failure in error.worker_failures.items()}
            return why_ended(failures, str(error))
    found = finished.return_value
    return Round(TrainerResult.model_validate_json(found) if found is not None else None)


def _cause(failure: BaseException) -> BaseException:
    """Return what a process has raised, below what Ray wraps it in."""
    return getattr(failure, "cause", None) or failure


def nodes_of_cluster() -> tuple[list[Node], str]:
    """Return the nodes that are alive, and which of Ray's resources a device is there."""
    every: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in every if node["Alive"]]
    kind = "GPU" if any("GPU" in node["Resources"] for node in alive) else "CPU"
    free = available_resources_per_node()  # type: ignore[no-untyped-call]

    def of(node_id: str, there: float) -> Node:
        return Node(node_id, there, free.get(node_id, {}).get(kind, 0.0))

    return [of(node["NodeID"], node["Resources"].get(kind, 0.0)) for node in alive], kind


def take_part_on_node(config: dict[str, str]) -> str | None:
    """Be one of the job's processes: what Ray Train calls in each; return JSON of the first one's result.

    :raises FailedWorkerError: if it failed.
    """
    node_id = ray.get_runtime_context().get_node_id()
    spec = placed(TrainerSpec.model_validate_json(config["spec"]), home(), node_id)
    place = place_among(node_id)
    attempt = Attempt(spec.work_dir, place, spec)
    make_folder(spec, home())
    result: TrainerResult | None = None
    try:
        result = take_part(spec, attempt)
        stopped = attempt.should_stop()
    except Exception as error:
        # Only the first process sees what the record says, and all of them stop.
        stopped = isinstance(error, StopRequestedError) or attempt.should_stop()
        if not stopped:
            failed = failure_of(error).model_dump_json()
            raise FailedWorkerError(failed, time.time(), lost_another(error)) from None
    if place.leader:  # what is worth keeping is in MLflow
        remove_folder(spec.work_dir)
    return result.model_dump_json() if result is not None and not stopped else None


def place_among(node_id: str) -> Ranks:
    """Return which of the job's processes this one is; all of them ask at once.

    Ray Train counts those of an address, and several nodes may have one.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    nodes: list[Any] = [None] * world
    distributed.all_gather_object(nodes, node_id)
    here = [other for other, its_node in enumerate(nodes) if its_node == node_id]
    return Ranks(rank, world, here.index(rank), len(here))


if __name__ == "__main__":
    sys.exit(main())
