"""Which places that MLflow names may be used on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from post_training.places import lies_under, may_be_used


@pytest.mark.parametrize(
    ("location", "allowed"),
    [
        ("{root}/a", True),
        ("file://{root}/with%20blank", True),
        ("file://{root}/%2e%2e/private", False),
        ("{root}/../private", False),
        ("{root}x/a", False),
        ("/etc", False),
        ("file:///etc", False),
        ("s3://bucket/etc", True),
        ("mlflow-artifacts:/0/etc", True),
    ],
)
def test_a_place_on_this_machine_lies_under_a_root(location: str, allowed: bool, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert may_be_used(location.format(root=root), [root]) is allowed


def test_links_are_followed_on_both_sides(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    (real / "inside").mkdir(parents=True)
    link.symlink_to(real)
    (real / "out").symlink_to(tmp_path)
    assert lies_under(real / "inside", [link])
    assert lies_under(link / "inside", [real])
    assert not lies_under(link / "out" / "elsewhere", [real])
    assert not lies_under(real, [])
