"""Files that jobs share: made once, under the digest of all that they are made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from lightning_modules.trained import rename_whole
from post_training.job_lock import taken
from post_training.schemas.evaluation import WorkerSpec
from post_training.schemas.trainer import CACHE_FOLDER

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 1800.0
"""How long is waited for what another process makes, before it is made here too."""

_POLL_SECONDS = 0.2


class Kept:
    """A folder of such files, by kind and digest; what was used last stays longest.

    Whatever is missing is made again, so that what nobody uses may be removed at any time.

    :param folder: made when something is kept.
    :param max_bytes: what ``trim`` leaves, unless more than that is in use.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    @classmethod
    def of(cls, spec: WorkerSpec) -> Kept:
        """Return what a process may use, trimmed."""
        kept = cls(spec.cache_dir or spec.work_dir / CACHE_FOLDER, spec.max_cache_bytes)
        kept.trim()
        return kept

    def place(self, kind: str, digest: str) -> Path:
        """Return the folder for what has this digest: in use from now on, as long as this object is there."""
        place = self._folder / kind / digest
        while True:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError):  # removed at this moment
                descriptor = os.open(place, os.O_RDONLY)
                weakref.finalize(self, os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.utime(place)
                return place

    def trim(self) -> None:
        """Remove what was used longest ago, and is not in use, until the rest has its size."""
        places = sorted(self._folder.glob("*/*"), key=lambda place: place.stat().st_mtime)
        sizes = {place: _size(place) for place in places}
        excess = sum(sizes.values()) - self._max_bytes
        for place in places:
            if excess > 0 and _removed(place):
                log.info("removed %s, %.0f MB, from what is kept for other jobs", place, sizes[place] / 1e6)
                excess -= sizes[place]


def _removed(place: Path) -> bool:
    """Remove what is kept at a place; return whether it could be, which it cannot while someone uses it."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        unused = taken(descriptor)
        if unused:
            shutil.rmtree(place, ignore_errors=True)
        return unused
    finally:
        os.close(descriptor)


@contextmanager
def alone(path: Path, give_up: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Be the only process that makes a file or folder of this name, as far as that can be waited for.

    :param give_up: asked while another process makes it.
    """
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = monotonic() + PATIENCE_SECONDS
        while not taken(descriptor):
            if give_up() or monotonic() > deadline:  # what is made twice is only made in vain
                break
            sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def make(path: Path, write: Callable[[Path], None]) -> Path:
    """Let a file or folder be written under another name, then give it its own; return it.

    Whoever makes the same meanwhile makes it in vain: one of them stays, and all are alike.
    """
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(draft)
        try:
            rename_whole(draft, path)
        except OSError:  # a folder that holds something is not replaced
            if not path.is_dir():
                raise
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
    return path


def link_tree(source: Path, target: Path) -> None:
    """Give the files of a folder a second name in another; copy them where the file system has none."""
    shutil.copytree(source, target, copy_function=link)


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; copy it where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def digest_of(*parts: Any) -> str:
    """Return a SHA-256 in hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
