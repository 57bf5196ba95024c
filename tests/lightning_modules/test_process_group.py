"""What a process hears when another is lost."""

from __future__ import annotations

import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch
from torch import distributed

from lightning_modules.process_group import joined, lost_another
from lightning_modules.ranks import Ranks
from post_training.errors import TrainerError


def join(rank: int, store: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    distributed.barrier()  # nobody is lost before all are there


def be_lost(store: str) -> None:
    join(1, store)
    os._exit(9)


def test_an_error_of_a_lost_process_is_told_from_others(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    other = multiprocessing.get_context("fork").Process(target=be_lost, args=(store,))
    other.start()
    join(0, store)
    try:
        with pytest.raises(TrainerError) as caught, joined(Ranks(0, 2)):
            distributed.all_reduce(torch.zeros(1))
    finally:
        other.join()
        distributed.destroy_process_group()
    assert lost_another(caught.value)
    assert re.match("another process of this job is lost: (Connection|Read error)", str(caught.value))
    wrapped = ValueError("the record was not written")
    wrapped.__cause__ = caught.value
    assert lost_another(wrapped)
    assert not lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_another(ValueError("gloo"))
