"""What a job's folder says of the attempt before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.attempts import (
    INPUTS_FILE,
    Inputs,
    begin,
    fetch_newest_state,
    inputs_here,
    keep_inputs,
)
from lightning_modules.checkpoint import RESUME_FILE
from lightning_modules.module import STATE_KEY
from lightning_modules.record import open_record
from post_training.errors import InputsChangedError
from post_training.schemas.trainer import TrainerSpec


def test_a_state_of_the_same_training_goes_on(make_spec: Any) -> None:
    spec = make_spec()
    inputs = Inputs.of(spec, ["base"], ["a"])
    assert inputs_here(spec.work_dir) is None
    keep_inputs(spec, inputs)
    save_state(spec, 3)
    begin(spec, inputs, open_record(spec), lambda: False)
    assert inputs_here(spec.work_dir) == inputs
    assert (spec.work_dir / RESUME_FILE).exists()


@pytest.mark.parametrize(
    ("changes", "digests"), [({}, ["b"]), ({}, ["a", "c"]), ({"training": {"n_epochs": 5}}, ["a"])]
)
def test_a_state_of_another_training_stays_and_is_not_gone_on_from(
    make_spec: Any, changes: dict[str, Any], digests: list[str]
) -> None:
    keep_inputs(make_spec(), Inputs.of(make_spec(), ["base"], ["a"]))
    spec = make_spec(**changes)
    inputs = Inputs.of(spec, "base", digests)
    (spec.work_dir / RESUME_FILE).write_text("3")
    with pytest.raises(InputsChangedError):
        begin(spec, inputs, open_record(spec), lambda: False)
    assert (spec.work_dir / RESUME_FILE).exists()
    assert inputs_here(spec.work_dir) != inputs


@pytest.mark.parametrize("left", [b"", b"\0\0", b'{"data": ["a'])
def test_inputs_that_were_cut_off_remove_no_state(left: bytes, make_spec: Any) -> None:
    spec = make_spec()
    keep_inputs(spec, Inputs.of(spec, ["base"], ["a"]))
    (spec.work_dir / INPUTS_FILE).write_bytes(left)
    save_state(spec, 3)
    begin(spec, Inputs.of(spec, ["base"], ["a"]), open_record(spec), lambda: False)
    assert (spec.work_dir / RESUME_FILE).exists()


def test_inputs_that_a_full_disk_does_not_take_are_the_ones_before(make_spec: Any) -> None:
    spec = make_spec()
    before = Inputs.of(spec, ["base"], ["a"])
    keep_inputs(spec, before)
    file = spec.work_dir / INPUTS_FILE
    file.with_name(f"{file.name}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        keep_inputs(spec, Inputs.of(spec, ["base"], ["b"]))
    assert file.read_text() == before.text


def test_a_digest_is_that_of_all_inputs_and_of_no_attempt(make_spec: Any, tmp_path: Path) -> None:
    digest = Inputs.of(make_spec(), ["base"], ["a"]).digest
    assert len(digest) == 64
    same = make_spec(
        attempt=3, attempt_id="0199-b", work_dir=tmp_path / "elsewhere", train_data="/copy.jsonl"
    )
    assert Inputs.of(same, ["base"], ["a"]).digest == digest
    others = [
        Inputs.of(make_spec(), ["base"], ["b"]),
        Inputs.of(make_spec(model="/other"), ["base"], ["a"]),
        Inputs.of(make_spec(runtime={"seed": 8}), ["base"], ["a"]),
        Inputs.of(make_spec(), ["models:/base/2"], ["a"]),
        Inputs.of(make_spec(), ["base", "overwritten"], ["a"]),
    ]
    assert len({digest, *(other.digest for other in others)}) == 6


def save_state(spec: TrainerSpec, step: int) -> Path:
    """Leave the state of a step in the spec's folder, as the attempt before did."""
    file = spec.work_dir / RESUME_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({STATE_KEY: {"optimizer_steps": step}, "weights": torch.ones(1000)}, file)
    return file


class Asked:
    """A record that has the state of step 9, and remembers what it was asked."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def restore_state(self, file: Path, *, step: int | None, inputs: str, give_up: Any) -> int | None:
        self.steps.append(step)
        return None if step == 9 else 9


@pytest.mark.parametrize("step", [None, 3, 9])
def test_the_record_is_asked_for_what_is_newer_than_the_folder_s(step: int | None, make_spec: Any) -> None:
    spec, record = make_spec(attempt=2), Asked()
    if step is not None:
        save_state(spec, step)
    fetch_newest_state(spec, Inputs.of(spec, ["base"], ["a"]), record, lambda: False)  # type: ignore[arg-type]
    assert record.steps == [step]


def test_the_record_is_asked_by_nodes_of_which_one_may_have_been_lost(make_spec: Any) -> None:
    spec, record = make_spec(runtime={"num_nodes": 2}), Asked()
    fetch_newest_state(spec, Inputs.of(spec, ["base"], ["a"]), record, lambda: False)  # type: ignore[arg-type]
    assert record.steps == [None]


@pytest.mark.parametrize("kept_bytes", [0, 100, -100])
def test_the_record_is_asked_for_its_state_where_the_folder_s_cannot_be_read(
    kept_bytes: int, make_spec: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spec, record = make_spec(attempt=2), Asked()
    file = save_state(spec, 3)
    file.write_bytes(file.read_bytes()[:kept_bytes])
    fetch_newest_state(spec, Inputs.of(spec, ["base"], ["a"]), record, lambda: False)  # type: ignore[arg-type]
    assert record.steps == [None]
    assert not file.exists()
    assert "last.ckpt cannot be read and is removed" in caplog.text


def test_a_first_attempt_asks_for_no_state(make_spec: Any) -> None:
    spec, record = make_spec(), Asked()
    fetch_newest_state(spec, Inputs.of(spec, ["base"], ["a"]), record, lambda: False)  # type: ignore[arg-type]
    assert record.steps == []
