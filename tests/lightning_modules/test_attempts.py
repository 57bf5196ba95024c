"""What a job's folder says of the attempt before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_modules.attempts import Inputs, continues, fetch_newest_state, keep_inputs
from lightning_modules.checkpoint import EXPORTS, RESUME_FILE, STEP_FILE


def test_a_state_of_the_same_training_goes_on(make_spec: Any) -> None:
    spec = make_spec()
    inputs = Inputs.of(spec, "base", ["a"])
    assert continues(spec, inputs)
    keep_inputs(spec, inputs)
    (spec.work_dir / RESUME_FILE).write_text("state")
    assert continues(spec, inputs)
    assert (spec.work_dir / RESUME_FILE).exists()


@pytest.mark.parametrize(
    ("changes", "digests"), [({}, ["b"]), ({}, ["a", "c"]), ({"training": {"n_epochs": 5}}, ["a"])]
)
def test_a_state_of_another_training_is_removed(
    make_spec: Any, changes: dict[str, Any], digests: list[str], tmp_path: Path
) -> None:
    keep_inputs(make_spec(), Inputs.of(make_spec(), "base", ["a"]))
    spec = make_spec(**changes, checkpoint_dir=tmp_path / "copies")
    inputs = Inputs.of(spec, "base", digests)
    states = [spec.work_dir / file for file in (RESUME_FILE, STEP_FILE)]
    for file in states:
        file.write_text("3")
    exports = [spec.work_dir / EXPORTS / "epoch-2", tmp_path / "copies" / "epoch-2"]
    for folder in exports:
        folder.mkdir(parents=True)
    assert not continues(spec, inputs)
    assert not any(path.exists() for path in (*states, *exports))
    assert not continues(spec, inputs), "the record has not forgotten the other training yet"
    keep_inputs(spec, inputs)
    assert continues(spec, inputs)


def test_a_digest_is_that_of_all_inputs_and_of_no_attempt(make_spec: Any, tmp_path: Path) -> None:
    digest = Inputs.of(make_spec(), "base", ["a"]).digest
    assert len(digest) == 64
    same = make_spec(
        attempt=3, attempt_id="0199-b", work_dir=tmp_path / "elsewhere", train_data="/copy.jsonl"
    )
    assert Inputs.of(same, "base", ["a"]).digest == digest
    others = [
        Inputs.of(make_spec(), "base", ["b"]),
        Inputs.of(make_spec(model="/other"), "base", ["a"]),
        Inputs.of(make_spec(runtime={"seed": 8}), "base", ["a"]),
        Inputs.of(make_spec(), "models:/base/2", ["a"]),
    ]
    assert len({digest, *(other.digest for other in others)}) == 5


class Asked:
    """A record that has the state of step 9, and remembers what it was asked."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def restore_state(self, file: Path, *, step: int | None, inputs: str, give_up: Any) -> int | None:
        self.steps.append(step)
        return None if step == 9 else 9


@pytest.mark.parametrize(
    ("state", "step", "asked", "left"),
    [
        (None, None, None, "9"),
        (None, "3", None, "9"),  # a state is what its own file holds
        ("state", "3", 3, "9"),
        ("state", "9", 9, "9"),
        ("state", "", None, "9"),  # killed while the step was written
        ("state", None, None, "9"),
    ],
)
def test_the_record_is_asked_for_what_is_newer_than_the_folder_s(
    state: str | None, step: str | None, asked: int | None, left: str, make_spec: Any
) -> None:
    spec, record = make_spec(attempt=2), Asked()
    (spec.work_dir / STEP_FILE).parent.mkdir(parents=True)
    for file, text in ((RESUME_FILE, state), (STEP_FILE, step)):
        if text is not None:
            (spec.work_dir / file).write_text(text)
    fetch_newest_state(spec, Inputs.of(spec, "base", ["a"]), record, lambda: False)  # type: ignore[arg-type]
    assert record.steps == [asked]
    assert (spec.work_dir / STEP_FILE).read_text() == left


def test_a_first_attempt_asks_for_no_state(make_spec: Any) -> None:
    spec, record = make_spec(), Asked()
    fetch_newest_state(spec, Inputs.of(spec, "base", ["a"]), record, lambda: False)  # type: ignore[arg-type]
    assert record.steps == []
