"""Which nodes a job on Ray takes, what it says where there are too few, and when it is begun again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.nodes import (
    CHECK_LOOKS,
    HOME,
    LOOK_SECONDS,
    FailedWorkerError,
    Node,
    Round,
    chosen,
    make_folder,
    placed,
    remove_left,
    too_few,
    train_in_rounds,
    wait_for_nodes,
    why_ended,
)
from post_training.errors import HardwareError, SupersededError, TrainerError
from post_training.schemas.trainer import TrainerResult, TrainerSpec
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


class Waiting:
    """A cluster over time: ``seen`` says which nodes each look finds, its last entry also all later ones."""

    def __init__(self, *seen: list[Node]) -> None:
        self.seen, self.looks, self.asked, self.seconds = seen, 0, 0, 0.0

    def look(self) -> tuple[list[Node], str]:
        self.looks += 1
        return self.seen[min(self.looks, len(self.seen)) - 1], "CPU"

    def check(self) -> None:
        self.asked += 1
        if self.asked == 3:
            raise SupersededError("nobody wants it")

    def pause(self, seconds: float) -> None:
        self.seconds += seconds

    def wait(self, spec: TrainerSpec) -> list[str]:
        return wait_for_nodes(spec, self.look, self.check, lambda: self.seconds, self.pause)


BUSY, FREE = [Node("a", 1, 0)], [Node("a", 1, 1)]


@pytest.fixture
def spec(make_spec: Any) -> TrainerSpec:
    found = make_spec(attempt_id="0199-b", runtime={"launcher": "ray"}, node_patience=10.0)
    assert isinstance(found, TrainerSpec)
    return found


def test_a_job_waits_for_nodes_that_others_use(spec: TrainerSpec) -> None:
    cluster = Waiting(*[BUSY] * 2 * CHECK_LOOKS, FREE)
    assert cluster.wait(spec) == ["a"]
    assert (cluster.seconds, cluster.asked) == (2 * CHECK_LOOKS * LOOK_SECONDS, 2)


def test_a_job_that_nobody_wants_waits_no_longer(spec: TrainerSpec) -> None:
    cluster = Waiting(BUSY)
    with pytest.raises(SupersededError):
        cluster.wait(spec)
    assert cluster.looks == 3 * CHECK_LOOKS


@pytest.mark.parametrize(("begun", "error"), [(False, HardwareError), (True, TrainerError)])
def test_nodes_that_are_missing_are_waited_for_a_while(
    spec: TrainerSpec, begun: bool, error: type[Exception]
) -> None:
    cluster = Waiting([], BUSY, [], FREE)
    assert cluster.wait(spec) == ["a"], "they came in time"
    cluster = Waiting([])
    with pytest.raises(error, match=r"got 1; more were waited for 10 s"):
        cluster.wait(spec.model_copy(update={"begun": begun}))
    assert cluster.seconds == 12


LOST = Round(TrainerResult(status="failed", error="process 1 was lost"), lost=True)
FAILED = Round(TrainerResult(status="failed", error="row 3 is bad"))
COMPLETED = Round(TrainerResult(status="completed"))


@pytest.mark.parametrize(
    ("rounds", "trained"),
    [
        ([COMPLETED], 1),
        ([FAILED, COMPLETED], 1),
        ([Round(None), COMPLETED], 1),
        ([LOST, COMPLETED], 2),
        ([LOST, FAILED, COMPLETED], 2),
        ([LOST, LOST, LOST], 3),
    ],
)
def test_a_job_is_begun_again_where_a_process_was_lost_alone(
    spec: TrainerSpec, rounds: list[Round], trained: int
) -> None:
    left, begun = list(rounds), []

    def train(spec: TrainerSpec) -> Round:
        begun.append(spec.begun)
        return left.pop(0)

    assert train_in_rounds(spec, train, lambda: None, 2) == rounds[trained - 1].result
    assert begun == [False, *[True] * (trained - 1)]


def test_a_job_that_nobody_wants_is_not_begun_again(spec: TrainerSpec) -> None:
    def unwanted() -> None:
        raise SupersededError("nobody wants it")

    with pytest.raises(SupersededError):
        train_in_rounds(spec, lambda spec: LOST, unwanted, 2)


def test_attempts_and_nodes_share_no_folder_where_they_share_a_disk(
    spec: TrainerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME, str(tmp_path))
    older = spec.model_copy(update={"attempt_id": "0199-a"})
    here = [placed(each, tmp_path, node) for each in (older, spec) for node in ("one", "two")]
    for each in here:
        make_folder(each, tmp_path)
        (each.work_dir / "file").touch()
    assert len({each.work_dir for each in here}) == 4
    there = [each.work_dir.exists() for each in here]
    assert there == [False, False, True, True], "what older attempts have left is removed"
    assert placed(spec, tmp_path, "one") == here[2], "rounds of an attempt go on in its folder"
    remove_left(spec.model_dump_json(), "two")
    assert [each.work_dir.exists() for each in here[2:]] == [True, False]
    remove_left(spec.model_dump_json(), "one")
    assert list((tmp_path / "ray").iterdir()) == []


def failed(error: str, at: float, *, permanent: bool = False, cut_off: bool = False) -> FailedWorkerError:
    result = TrainerResult(status="failed", error=error, permanent=permanent)
    travelled = pickle.loads(pickle.dumps(FailedWorkerError(result.model_dump_json(), at, cut_off)))
    assert isinstance(travelled, FailedWorkerError)
    return travelled


@pytest.mark.parametrize(
    ("failures", "error", "lost"),
    [
        ({0: failed("closed", 1.0, cut_off=True), 1: failed("out of memory", 2.0)}, "out of memory", False),
        ({0: failed("disk full", 2.0), 1: failed("out of memory", 1.0)}, "out of memory", False),
        ({0: failed("closed", 1.0, cut_off=True)}, "a process was lost: closed", True),
        (
            {0: failed("closed", 1.0, cut_off=True), 1: OSError("node died\nat once")},
            "process 1 was lost: node died",
            True,
        ),
        ({0: OSError("gone"), 1: failed("row 3 is bad", 9.0, permanent=True)}, "row 3 is bad", False),
        ({}, "the processes did not start: controller error: no answer", True),
    ],
)
def test_the_reason_is_what_came_first_or_is_final(
    failures: dict[int, Exception], error: str, lost: bool
) -> None:
    ended = why_ended(failures, "controller error:\n  no answer")
    assert ended == Round(TrainerResult(status="failed", error=error, permanent="row" in error), lost)


def test_other_data_ends_a_round_for_good() -> None:
    changed = TrainerResult(status="inputs_changed", error="the data changed")
    ended = why_ended({0: OSError("gone"), 1: FailedWorkerError(changed.model_dump_json(), 1.0)}, "")
    assert ended == Round(changed)
