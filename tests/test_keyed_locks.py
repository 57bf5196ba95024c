"""Locks by name."""

from __future__ import annotations

import gc
import threading

from post_training.keyed_locks import KeyedLocks


def test_one_name_is_held_once_and_another_is_free() -> None:
    locks, entered = KeyedLocks(), threading.Event()

    def enter(name: str) -> None:
        with locks.hold(name):
            entered.set()

    with locks.hold("a"):
        same, other = (threading.Thread(target=enter, args=(name,)) for name in "ab")
        same.start()
        assert not entered.wait(0.2)
        other.start()
        assert entered.wait(5)
        other.join()
        entered.clear()
    assert entered.wait(5)
    same.join()


def test_names_that_nobody_uses_are_forgotten() -> None:
    locks = KeyedLocks()
    for name in map(str, range(100)):
        with locks.hold(name):
            pass
    gc.collect()
    assert len(locks._locks) == 0
