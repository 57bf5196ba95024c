"""Locks by name, for what must not be done twice at once under one name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary


class KeyedLocks:
    """One lock for each name that is in use; within one process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, _Lock] = WeakValueDictionary()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold a name's lock."""
        with self._guard:
            lock = self._locks.get(name)
            if lock is None:
                lock = self._locks[name] = _Lock()
        with lock.lock:
            yield


class _Lock:
    """A lock that may be referred to weakly."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
