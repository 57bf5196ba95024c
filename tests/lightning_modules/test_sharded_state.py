"""A state of divided weights, on a mesh of one process; with two it is part of ``test_several``."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.checkpoint import FileCheckpointIO, readable_step
from lightning_modules.module import STATE_KEY
from lightning_modules.ranks import ALONE
from lightning_modules.sharded_state import (
    OPTIMIZERS,
    REST,
    WEIGHTS,
    is_sharded,
    read_divided,
    read_rest,
    read_whole,
    write,
)
from lightning_modules.sharding import whole

STEPS = 3


class Divided:
    """A divided model with an optimizer."""

    def __init__(self, mesh: DeviceMesh, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 5))
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def train(self) -> None:
        for step in range(STEPS):
            self.model(torch.full((2, 6), 1.0 + step)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def state(self) -> dict[str, Any]:
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        return {
            WEIGHTS: weights,
            OPTIMIZERS: [self.optimizer.state_dict()],
            STATE_KEY: {"optimizer_steps": STEPS},
        }

    def take(self, file: Path) -> dict[str, Any]:
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        state = read_divided(file, self.weights, [weights], ALONE)
        self.optimizer.load_state_dict(state[OPTIMIZERS][0])
        return state


def plain(values: Any) -> Any:
    """The same with whole tensors of its own."""
    if isinstance(values, Tensor):
        return whole(values.detach()).clone()
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items()}
    return [plain(value) for value in values] if isinstance(values, list | tuple) else copy.copy(values)


@pytest.fixture
def trained(mesh: DeviceMesh) -> Divided:
    divided = Divided(mesh, seed=1)
    divided.train()
    return divided


@pytest.fixture
def file(trained: Divided, tmp_path: Path) -> Path:
    file = tmp_path / "state" / "last.tmp"
    file.parent.mkdir()
    write(trained.state(), file, ALONE)
    return file


def test_one_process_reads_what_it_would_have_written(trained: Divided, file: Path) -> None:
    expected = plain(trained.state())
    found = FileCheckpointIO().load_checkpoint(file)
    assert plain(found)[OPTIMIZERS][0]["param_groups"] == expected[OPTIMIZERS][0]["param_groups"]
    torch.testing.assert_close(found[WEIGHTS], expected[WEIGHTS], rtol=0, atol=0)
    torch.testing.assert_close(
        found[OPTIMIZERS][0]["state"], expected[OPTIMIZERS][0]["state"], rtol=0, atol=0
    )
    assert not any(isinstance(value, DTensor) for value in found[WEIGHTS].values())


def test_divided_weights_take_their_parts(trained: Divided, file: Path, mesh: DeviceMesh) -> None:
    other = Divided(mesh, seed=2)
    other.take(file)
    assert plain(other.state()) != {}
    torch.testing.assert_close(plain(other.weights), plain(trained.weights), rtol=0, atol=0)
    for divided in (trained, other):
        divided.train()
    torch.testing.assert_close(plain(other.weights), plain(trained.weights), rtol=0, atol=0)


def test_it_is_one_file_and_what_was_saved_trains_on(trained: Divided, file: Path) -> None:
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with zipfile.ZipFile(file) as archive:
        assert sorted(archive.namelist()) == ["shard-00001-model-00001-of-00001.safetensors", REST]
    trained.train()  # its optimizer has all that it had
    assert all({"exp_avg", "exp_avg_sq", "step"} == set(kept) for kept in trained.optimizer.state.values())


def test_its_step_is_read_without_its_tensors(file: Path, tmp_path: Path) -> None:
    assert is_sharded(file)
    assert readable_step(file) == STEPS
    assert read_rest(file)[WEIGHTS] == {}
    usual = tmp_path / "usual.ckpt"
    torch.save({STATE_KEY: {"optimizer_steps": 4}}, usual)
    assert not is_sharded(usual)
    assert readable_step(usual) == 4


def test_half_a_file_is_removed(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    assert readable_step(file) is None
    assert not file.exists()


def test_what_is_no_part_is_not_unpacked(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../outside.safetensors.py", "")
        archive.writestr("other.bin", "")
    read_whole(file)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([file.name, "state"])


def test_a_disk_that_refuses_is_an_error_of_the_system(trained: Divided, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        write(trained.state(), tmp_path / "taken" / "last.tmp", ALONE)
