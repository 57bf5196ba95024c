"""What a job's folder says of the attempt before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_modules.attempts import continues, keep_inputs
from lightning_modules.checkpoint import EXPORTS, RESUME_FILE


def test_a_state_of_the_same_training_goes_on(make_spec: Any) -> None:
    spec = make_spec()
    assert continues(spec, ["a"])
    keep_inputs(spec, ["a"])
    (spec.work_dir / RESUME_FILE).write_text("state")
    assert continues(spec, ["a"])
    assert (spec.work_dir / RESUME_FILE).exists()


@pytest.mark.parametrize(
    ("changes", "digests"), [({}, ["b"]), ({}, ["a", "c"]), ({"training": {"n_epochs": 5}}, ["a"])]
)
def test_a_state_of_another_training_is_removed(
    make_spec: Any, changes: dict[str, Any], digests: list[str], tmp_path: Path
) -> None:
    keep_inputs(make_spec(), ["a"])
    spec = make_spec(**changes, checkpoint_dir=tmp_path / "copies")
    (spec.work_dir / RESUME_FILE).write_text("state")
    exports = [spec.work_dir / EXPORTS / "epoch-2", tmp_path / "copies" / "epoch-2"]
    for folder in exports:
        folder.mkdir(parents=True)
    assert not continues(spec, digests)
    assert not (spec.work_dir / RESUME_FILE).exists()
    assert not any(folder.exists() for folder in exports)
    assert not continues(spec, digests), "the record has not forgotten the other training yet"
    keep_inputs(spec, digests)
    assert continues(spec, digests)
