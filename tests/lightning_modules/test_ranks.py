"""Who a process is among those of its job."""

from __future__ import annotations

from lightning_modules.ranks import ALONE, Ranks, place_in

STARTED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_torchrun_says_who_a_process_is() -> None:
    place = place_in(STARTED | {"TORCHELASTIC_RUN_ID": "x"})
    assert place == Ranks(rank=5, world=8, local_rank=1, local_world=4)
    assert (place.first, place.leader) == (False, False)
    assert place_in(STARTED) == ALONE, "set by somebody else"


def test_alone_nobody_is_waited_for() -> None:
    assert (ALONE.first, ALONE.leader) == (True, True)
    assert (ALONE.sums([1.5]), ALONE.any(True), ALONE.gathered("a"), ALONE.told("a")) == (
        [1.5],
        True,
        ["a"],
        "a",
    )
    with ALONE.leaders_first():
        ALONE.wait()
