"""What jobs keep for each other, and what is removed first."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from lightning_modules.kept import YOUNG_SECONDS, Kept, digest_of, make

DAY = 86_400


def filled(kept: Kept, kind: str, digest: str, size: int, age: float) -> Path:
    place = kept.place(kind, digest)
    (place / "part").mkdir()
    (place / "part" / "file").write_bytes(b"x" * size)
    then = time.time() - age
    os.utime(place, (then, then))
    return place


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", max_bytes=250)
    oldest, old = filled(kept, "models", "a", 100, 3 * DAY), filled(kept, "tokenized", "b", 100, 2 * DAY)
    middle, young = filled(kept, "tokenized", "c", 100, DAY), filled(kept, "models", "d", 100, 0)
    kept.trim()
    assert [place.exists() for place in (oldest, old, middle, young)] == [False, False, True, True]


def test_to_ask_for_it_is_to_use_it(tmp_path: Path) -> None:
    kept = Kept(tmp_path, max_bytes=150)
    first, second = filled(kept, "models", "a", 100, 3 * DAY), filled(kept, "models", "b", 100, 2 * DAY)
    assert kept.place("models", "a") == first
    kept.trim()
    assert (first.exists(), second.exists()) == (True, False)


def test_what_a_job_may_be_using_stays(tmp_path: Path) -> None:
    kept = Kept(tmp_path, max_bytes=0)
    used, unused = (
        filled(kept, "models", name, 10, YOUNG_SECONDS + late) for name, late in (("a", -60), ("b", 60))
    )
    kept.trim()
    assert (used.exists(), unused.exists()) == (True, False)
    Kept(tmp_path / "nothing", max_bytes=0).trim()


def test_nothing_half_written_has_the_name(tmp_path: Path) -> None:
    def fail(draft: Path) -> None:
        draft.write_text("half")
        assert not (tmp_path / "file").exists()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        make(tmp_path / "file", fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "source").write_text("whole")
    make(tmp_path / "file", lambda draft: shutil.move(tmp_path / "source", draft))
    assert (tmp_path / "file").read_text() == "whole"


def test_a_folder_that_another_job_has_made_meanwhile_stays(tmp_path: Path) -> None:
    def write(draft: Path) -> None:
        for folder, text in ((draft, "ours"), (tmp_path / "model", "theirs")):
            folder.mkdir()
            (folder / "weights").write_text(text)

    make(tmp_path / "model", write)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "theirs"


def test_digests_tell_parts_from_each_other() -> None:
    assert digest_of("a", ["b"]) == digest_of("a", ["b"])
    assert len({digest_of("ab"), digest_of("a", "b"), digest_of("a", ["b"]), digest_of("b", "a")}) == 4
