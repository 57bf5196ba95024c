"""Which nodes a job on Ray takes, what it says where there are too few, and why a round has ended."""

from __future__ import annotations

import pytest

from lightning_modules.nodes import FailedWorkerError, Node, chosen, too_few, why_ended
from post_training.schemas.trainer import TrainerResult
from post_training.schemas.training import RuntimeConfig

NODES = [Node("head", 0, 0), Node("a", 2, 1), Node("b", 2, 2), Node("c", 4, 4)]


def wanted(num_nodes: int, devices: int) -> RuntimeConfig:
    return RuntimeConfig(num_nodes=num_nodes, devices=devices, launcher="ray")


@pytest.mark.parametrize(
    ("num_nodes", "devices", "taken"),
    [(1, 3, {"c"}), (2, 2, {"b", "c"}), (3, 1, {"a", "b", "c"}), (3, 2, None), (1, 5, None)],
)
def test_a_job_takes_whole_nodes_that_are_free(num_nodes: int, devices: int, taken: set[str] | None) -> None:
    found = chosen(NODES, wanted(num_nodes, devices), "job")
    assert (found and set(found)) == taken
    assert found is None or len(found) == num_nodes


def test_jobs_that_look_at_once_prefer_different_nodes() -> None:
    jobs = [f"job-{number}" for number in range(30)]
    first = [tuple(chosen(NODES, wanted(1, 1), job) or ()) for job in jobs]
    assert set(first) == {("a",), ("b",), ("c",)}
    assert first == [tuple(chosen(NODES[::-1], wanted(1, 1), job) or ()) for job in jobs]


@pytest.mark.parametrize(
    ("num_nodes", "devices", "sentence"),
    [
        (3, 2, None),
        (4, 2, "runtime.num_nodes must be at most 3, the Ray cluster's nodes with 2 GPUs, got 4"),
        (1, 5, "runtime.devices must be at most 4, the GPUs of the Ray cluster's largest node, got 5"),
    ],
)
def test_what_a_cluster_lacks_is_told(num_nodes: int, devices: int, sentence: str | None) -> None:
    assert too_few(NODES, "GPU", wanted(num_nodes, devices)) == sentence


def failed(error: str, at: float, *, permanent: bool = False) -> FailedWorkerError:
    result = TrainerResult(status="failed", error=error, permanent=permanent)
    return FailedWorkerError(result.model_dump_json(), at)


@pytest.mark.parametrize(
    ("failures", "error"),
    [
        ({0: failed("closed by peer", 2.0), 1: failed("out of memory", 1.0)}, "out of memory"),
        (
            {0: failed("closed by peer", 1.0), 1: OSError("node died\nat once")},
            "process 1 was lost: node died",
        ),
        ({0: OSError("gone"), 1: failed("row 3 is bad", 9.0, permanent=True)}, "row 3 is bad"),
        ({}, "the processes did not start: controller error: no answer"),
    ],
)
def test_the_reason_is_what_came_first_or_is_final(failures: dict[int, Exception], error: str) -> None:
    ended = why_ended(failures, "controller error:\n  no answer")
    assert (ended.status, ended.error) == ("failed", error)


def test_other_data_ends_a_round_for_good() -> None:
    changed = TrainerResult(status="inputs_changed", error="the data changed")
    ended = why_ended({0: OSError("gone"), 1: FailedWorkerError(changed.model_dump_json(), 1.0)}, "")
    assert ended.status == "inputs_changed"
