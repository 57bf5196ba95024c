"""Locks by name."""

from __future__ import annotations

import gc
import threading

import pytest

from post_training.errors import BusyError
from post_training.keyed_locks import KeyedLocks


def test_one_name_is_held_once_and_another_is_free() -> None:
    locks, asking, entered = KeyedLocks(), threading.Event(), threading.Event()

    def enter(name: str) -> None:
        asking.set()
        with locks.hold(name):
            entered.set()

    with locks.hold("a"):
        same, other = (threading.Thread(target=enter, args=(name,)) for name in "ab")
        same.start()
        assert asking.wait(30)
        assert not entered.wait(0.2)
        other.start()
        assert entered.wait(30)
        other.join()
        entered.clear()
    assert entered.wait(30)
    same.join()


def test_a_lock_that_does_not_become_free_is_not_waited_for_for_ever() -> None:
    locks = KeyedLocks(patience=0.05)
    with locks.hold("a"):
        with pytest.raises(BusyError, match="another call for 'a' is under way"), locks.hold("a"):
            pytest.fail("held twice")
    with locks.hold("a"):
        pass


def test_names_that_nobody_uses_are_forgotten() -> None:
    locks = KeyedLocks()
    for name in map(str, range(100)):
        with locks.hold(name):
            pass
    gc.collect()
    assert len(locks._locks) == 0
