"""What a job's folder says of the attempt before."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_modules.job import RESUME_FILE, continues


def test_a_state_of_the_same_training_goes_on(make_spec: Any) -> None:
    spec = make_spec()
    assert continues(spec, ["a"])
    (spec.work_dir / RESUME_FILE).write_text("state")
    assert continues(spec, ["a"])
    assert (spec.work_dir / RESUME_FILE).exists()


@pytest.mark.parametrize(
    ("changes", "digests"), [({}, ["b"]), ({}, ["a", "c"]), ({"training": {"n_epochs": 5}}, ["a"])]
)
def test_a_state_of_another_training_is_removed(
    make_spec: Any, changes: dict[str, Any], digests: list[str]
) -> None:
    assert continues(make_spec(), ["a"])
    spec = make_spec(**changes)
    (spec.work_dir / RESUME_FILE).write_text("state")
    assert not continues(spec, digests)
    assert not (spec.work_dir / RESUME_FILE).exists()
    assert continues(spec, digests)
