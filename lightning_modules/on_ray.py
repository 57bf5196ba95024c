"""Trainers on the nodes of a Ray cluster: ``python -m lightning_modules.on_ray SPEC.json``, a job of Ray's.

Ray Train starts one process for each device, ``runtime.devices`` of them on each of ``runtime.num_nodes``
nodes, and joins them; what they do then is what torchrun's do. Where one is lost Ray Train ends the others,
and all are started again on the nodes that there are then. Nodes share no disk: the state is MLflow's.

Ray Train could begin again by itself (``FailureConfig``). It would wait for a node forever, and try again
what no other attempt can mend, so each round here is a run of Ray Train's that may not fail.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
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
from torch import distributed

from lightning_modules.elastic import RESTARTS
from lightning_modules.nodes import FailedWorkerError, Node, chosen, placed, too_few, why_ended
from lightning_modules.process import EXIT_COMPLETED, EXIT_FAILED, describe, is_permanent, spec_file
from lightning_modules.process_group import TIMEOUT
from lightning_modules.ranks import Ranks
from lightning_modules.train import EXIT_STOPPED, Attempt, failure_of, take_part
from post_training.errors import HardwareError, TrainerError
from post_training.schemas.trainer import RESULT_LINE, TrainerResult, TrainerSpec
from post_training.schemas.training import RuntimeConfig

HOME = "POST_TRAINING_HOME"
"""Environment variable of a node: the folder for jobs' working files."""

STARTS = 10
"""How often nodes are looked for in one round, if others take them before it begins."""

LOOK_SECONDS = 2.0
"""Between two looks for nodes."""

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
    except Exception as error:
        result = TrainerResult(status="failed", error=describe(error), permanent=is_permanent(error))
    if result is None:
        print("cancelled, or a newer attempt runs", file=sys.stderr)
        return EXIT_STOPPED
    if result.error:
        print(f"failed: {result.error}", file=sys.stderr)
    signed = result.model_copy(update={"attempt_id": spec.attempt_id if spec is not None else ""})
    print(f"{RESULT_LINE}{signed.model_dump_json()}", flush=True)
    return EXIT_COMPLETED if result.status == "completed" else EXIT_FAILED


def train_on_nodes(spec: TrainerSpec) -> TrainerResult | None:
    """Train in rounds until one is not lost; return the first process's result, None where it was stopped.

    :raises HardwareError: if the cluster has not as many devices.
    :raises TrainerError: if it has them no more.
    """
    again = spec.model_copy(update={"begun": True})
    result = _round_on_free_nodes(spec)
    for left in reversed(range(RESTARTS)):
        if result is None or result.status != "failed" or result.permanent:
            break
        print(f"{result.error}; begun again from the newest state, {left} restarts are left", flush=True)
        result = _round_on_free_nodes(again)
    return result


def _round_on_free_nodes(spec: TrainerSpec) -> TrainerResult | None:
    """Train a round on nodes that are free; others may take them before it has begun."""
    reason = ""
    for _ in range(STARTS):
        try:
            return _round(spec, nodes_for(spec))
        except TrainingFailedError as error:
            reason = str(error)
            if not _was_late(error):
                break
            print("the nodes were taken, or lost, before it began", flush=True)
    return why_ended({}, reason)


def _was_late(error: TrainingFailedError) -> bool:
    """Whether a round did not begin because its processes got no devices."""
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    return isinstance(failure, WorkerGroupStartupTimeoutError | WorkerGroupStartupFailedError)


def _round(spec: TrainerSpec, nodes: Sequence[str]) -> TrainerResult | None:
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
    trainer = TorchTrainer(
        take_part_on_node,  # type: ignore[arg-type]  # it returns the run's value
        train_loop_config={"spec": spec.model_dump_json()},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if kind == "GPU" else "gloo", timeout_s=int(TIMEOUT.total_seconds())
        ),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(storage_path=str(home() / "ray-train"), failure_config=FailureConfig(**at_once)),
    )
    try:
        finished: Any = trainer.fit()  # whose types are those of Ray Train's first version
    except WorkerGroupError as error:
        failures = {rank: _cause(failure) for rank, failure in error.worker_failures.items()}
        return why_ended(failures, str(error))
    found = finished.return_value
    return TrainerResult.model_validate_json(found) if found is not None else None


def _cause(failure: BaseException) -> BaseException:
    """Return what a process has raised, below what Ray wraps it in."""
    return getattr(failure, "cause", None) or failure


def nodes_for(spec: TrainerSpec) -> list[str]:
    """Return the nodes that a job takes; wait while others use them, and a while for those that are missing.

    :raises HardwareError: if they do not appear.
    :raises TrainerError: the same for a training that has begun: it had them.
    """
    wanted = spec.request.runtime or RuntimeConfig()
    complete = time.monotonic()
    while True:
        nodes, kind = nodes_of_cluster()
        found = chosen(nodes, wanted, spec.request.job_uuid)
        missing = too_few(nodes, kind, wanted)
        if found is not None:
            return found
        if missing is None:
            complete = time.monotonic()
        elif time.monotonic() - complete > spec.node_patience:
            missing = f"{missing}; more were waited for {spec.node_patience:g} s"
            if spec.begun:
                raise TrainerError(f"nodes were lost while it trained: {missing}")
            raise HardwareError(missing)
        time.sleep(LOOK_SECONDS)


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
    spec = placed(TrainerSpec.model_validate_json(config["spec"]), home())
    place = place_among(ray.get_runtime_context().get_node_id())
    attempt = Attempt(spec.work_dir, place, spec)
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    try:
        result = take_part(spec, attempt)
    except Exception as error:
        if attempt.should_stop():
            return None
        raise FailedWorkerError(failure_of(error).model_dump_json(), time.time()) from None
    if attempt.should_stop():
        return None
    if place.leader:  # what is worth keeping is in MLflow
        shutil.rmtree(spec.work_dir, ignore_errors=True)
    return result.model_dump_json() if result is not None else None


def place_among(node_id: str) -> Ranks:
    """Return which of the job's processes this one is; all of them ask at once.

    Ray Train counts those of an address, and several nodes may have one.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    nodes: list[Any] = [None] * world
    distributed.all_gather_object(nodes, node_id)
    here = [other for other, its_node in enumerate(nodes) if its_node == node_id]
    return Ranks(rank, world, here.index(rank), len(here))


def home() -> Path:
    """Return the folder of this node for jobs' working files."""
    given = os.environ.get(HOME)
    return Path(given) if given else Path.home() / ".cache" / "post_training"


if __name__ == "__main__":
    sys.exit(main())
