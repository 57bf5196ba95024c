"""What jobs keep for each other, and what is removed first."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_modules.kept import Kept, alone, digest_of, make

DAY = 86_400


def fill(folder: Path, kind: str, digest: str, age: float) -> Path:
    """Keep 100 bytes that were used some days ago, and are no longer."""
    place = Kept(folder, 0).place(kind, digest)
    (place / "part").mkdir()
    (place / "part" / "file").write_bytes(b"x" * 100)
    then = time.time() - age * DAY
    os.utime(place, (then, then))
    return place


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    ages = [("models", "a", 4), ("tokenized", "b", 3), ("tokenized", "c", 2), ("models", "d", 1)]
    places = [fill(tmp_path, *one) for one in reversed(ages)][::-1]
    Kept(tmp_path, max_bytes=250).trim()
    assert [place.exists() for place in places] == [False, False, True, True]
    Kept(tmp_path / "nothing", max_bytes=0).trim()


def test_to_ask_for_it_is_to_use_it(tmp_path: Path) -> None:
    first, second = fill(tmp_path, "models", "a", 3), fill(tmp_path, "models", "b", 2)
    assert Kept(tmp_path, 0).place("models", "a") == first
    Kept(tmp_path, max_bytes=150).trim()
    assert (first.exists(), second.exists()) == (True, False)


def test_what_a_job_uses_stays(tmp_path: Path) -> None:
    used, unused = fill(tmp_path, "models", "a", 3), fill(tmp_path, "models", "b", 2)
    job = Kept(tmp_path, max_bytes=0)
    job.place("models", "a")
    os.utime(used, (0, 0))
    Kept(tmp_path, max_bytes=0).trim()
    assert (used.exists(), unused.exists()) == (True, False)
    del job
    Kept(tmp_path, max_bytes=0).trim()
    assert not used.exists()


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


def test_of_those_who_make_the_same_one_works_and_the_others_wait(tmp_path: Path) -> None:
    path, made = tmp_path / "file", []

    def make_once(number: int) -> None:
        with alone(path):
            if not path.exists():
                made.append(number)
                make(path, lambda draft: draft.write_text("whole"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make_once, range(4)))
    assert len(made) == 1


def test_who_is_to_stop_waits_no_longer(tmp_path: Path) -> None:
    with alone(tmp_path / "file"), alone(tmp_path / "file", give_up=lambda: True):
        pass
    with alone(tmp_path / "file", give_up=lambda: pytest.fail("it is free")):
        pass
