"""What runs on a Ray cluster, as far as that is known without one; importing Ray takes many seconds.

The cluster itself is in ``tests/system/test_ray.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_modules.ranks import Ranks
from post_training.errors import TrainerError
from post_training.launch.ray_jobs import RayJob, result_in


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Undo what Ray does to its process."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)


def test_what_it_takes_of_ray_is_there_and_its_result_is_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Some of it has private names, so that another version of Ray may not have it."""
    from lightning_modules import on_ray
    from lightning_modules.ray_environment import PlacedEnvironment

    place = PlacedEnvironment(Ranks(rank=3, world=4, local_rank=1, local_world=2))
    assert (place.local_rank(), place.node_rank()) == (1, 1), "Ray would count those of an address"

    print("a line that another thread has not ended", end="", flush=True)
    assert on_ray.main([str(tmp_path / "no spec.json")]) == 1
    log = capfd.readouterr().out
    result = result_in(log, RayJob("FAILED"), "")
    assert (result.status, "No such file" in str(result.error)) == ("failed", True)
    assert log.splitlines()[0] == "a line that another thread has not ended"
    with pytest.raises(TrainerError):
        result_in(log, RayJob("FAILED"), "another attempt")
