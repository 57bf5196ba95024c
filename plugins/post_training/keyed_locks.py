"""Locks by name, for what must not be done twice at once under one name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from post_training.errors import BusyError


class KeyedLocks:
    """One lock for each name that is in use; within one process.

    :param patience: seconds for which a lock is waited for.
    """

    def __init__(self, patience: float = 20.0) -> None:
        self._patience = patience
        self._guard = threading.Lock()
        self._locks: WeakValueDictionary[str, _Lock] = WeakValueDictionary()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold a name's lock.

        :raises BusyError: if it does not become free.
        """
        with self._guard:
            lock = self._locks.get(name)
            if lock is None:
                lock = self._locks[name] = _Lock()
        if not lock.lock.acquire(timeout=self._patience):
            raise BusyError(f"another call for {name!r} is under way and does not end")
        try:
            yield
        finally:
            lock.lock.release()


class _Lock:
    """A lock that may be referred to weakly."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
