"""The resume state of divided weights as one file, of which each process writes and reads its own part.

The file is a zip archive without compression: what torch itself saves in ``state.pt``, and a safetensors file
of each process, as torch's distributed checkpoints are in Hugging Face's format:
https://docs.pytorch.org/docs/stable/distributed.checkpoint.html . Nothing in it is pickled but for
``state.pt``, which is read with ``weights_only``.

Any number of processes reads it, one alone too: :func:`read_whole`.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from lightning_modules.ranks import Ranks

REST, SHARDS = "state.pt", "*.safetensors"
WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"
PIECE = 64 * 2**20
"""Bytes that travel at once from one machine to another."""


def is_sharded(file: Path) -> bool:
    """Whether a state is of this form; torch's own files are archives too."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return REST in archive.namelist()


def read_rest(file: Path) -> dict[str, Any]:
    """Return a state without what was divided."""
    with zipfile.ZipFile(file) as archive:
        rest: dict[str, Any] = torch.load(
            io.BytesIO(archive.read(REST)), map_location="cpu", weights_only=True
        )
    return rest


def write(state: dict[str, Any], file: Path, ranks: Ranks) -> None:
    """Write a state whose weights and optimizers are divided; all processes at once.

    The parts of other machines come to the first one's disk piece by piece: no process holds more than its
    own in memory.

    :param state: as Lightning collects it.
    :raises OSError: in all processes if one cannot write its part; in the first alone if it cannot write
        the file.
    """
    folder = _parts_of(file, ranks)
    parts, rest = _taken_apart(state)
    try:
        _make(folder, ranks)
        _save(parts, folder)
        _collect(folder, ranks)
        if ranks.first:
            torch.save(rest, folder / REST)
            _pack(folder, file)
    finally:
        if ranks.leader:
            shutil.rmtree(folder, ignore_errors=True)


def read_divided(
    file: Path, weights: Mapping[str, Tensor], optimizers: Sequence[Sequence[Tensor]], ranks: Ranks
) -> dict[str, Any]:
    """Read each process's part, that of the weights in place; all processes at once.

    :param weights: by name.
    :param optimizers: of each, the weights that it changes, in its order.
    :return: the state, without weights; its optimizers have their parts.
    """
    state = read_rest(file)
    folder = _parts_of(file, ranks)
    if ranks.leader:
        _unpack(file, folder)
    ranks.wait()
    parts: dict[str, Any] = {}
    for key in _stored(folder):
        place, *names = _names(key)
        if place == WEIGHTS:
            parts[key] = weights[names[0]].detach()
        else:
            parts[key] = torch.zeros_like(optimizers[int(names[0])][int(names[1])].detach())
    load(parts, storage_reader=HuggingFaceStorageReader(str(folder)))
    ranks.wait()
    if ranks.leader:
        shutil.rmtree(folder)
    _put(state, {key: part for key, part in parts.items() if _names(key)[0] == OPTIMIZERS})
    return state


def read_whole(file: Path) -> dict[str, Any]:
    """Read a state as one process that trains alone would have saved it."""
    state = read_rest(file)
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        folder = Path(name)
        _unpack(file, folder)
        tensors: dict[str, Any] = {
            key: torch.empty(stored.size, dtype=stored.properties.dtype)
            for key, stored in _stored(folder).items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in a single process", category=UserWarning)
            load(tensors, storage_reader=HuggingFaceStorageReader(name), no_dist=True)
    _put(state, tensors)
    return state


def _parts_of(file: Path, ranks: Ranks) -> Path:
    """Return the folder of a machine's parts; machines may share a disk."""
    return file.with_name(f".{file.name}.parts-{ranks.rank // ranks.local_world}")


def _taken_apart(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is divided, by key, and the state without it; what it is made of stays as it is."""
    parts: dict[str, Any] = {}

    def rest_of(values: Mapping[Any, Any], *place: object) -> dict[Any, Any]:
        divided = {key: value for key, value in values.items() if isinstance(value, DTensor)}
        parts.update({".".join(map(str, (*place, key))): value for key, value in divided.items()})
        return {key: value for key, value in values.items() if key not in divided}

    optimizers = [
        optimizer
        | {"state": {of: rest_of(kept, OPTIMIZERS, number, of) for of, kept in optimizer["state"].items()}}
        for number, optimizer in enumerate(state[OPTIMIZERS])
    ]
    return parts, {**state, WEIGHTS: rest_of(state[WEIGHTS], WEIGHTS), OPTIMIZERS: optimizers}


def _names(key: str) -> tuple[str, ...]:
    """Return what a part belongs to: a weight's name, or optimizer, weight and what is kept of it."""
    place, _, name = key.partition(".")
    return (place, name) if place == WEIGHTS else (place, *name.split(".", 2))


def _put(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        place, *names = _names(key)
        if place == WEIGHTS:
            state[WEIGHTS][names[0]] = tensor
        else:
            state[OPTIMIZERS][int(names[0])]["state"][int(names[1])][names[2]] = tensor


def _make(folder: Path, ranks: Ranks) -> None:
    """Make the folder on every machine, or raise OSError in all processes."""
    failure = ""
    if ranks.leader:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    if failures := [said for said in ranks.gathered(failure) if said]:
        raise OSError(failures[0])


def _save(parts: Mapping[str, Any], folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(parts), storage_writer=writer)
    except CheckpointException as error:  # in all processes; it is no Exception
        causes = [str(cause) for cause, _ in error.failures.values()]
        raise OSError(f"a part of the state was not written: {causes[0]}") from None


def _collect(folder: Path, ranks: Ranks) -> None:
    """Bring the other machines' parts to the first one."""
    for leader in range(ranks.local_world, ranks.world, ranks.local_world):
        if ranks.rank == leader:
            _send(folder)
        elif ranks.first:
            _receive(folder, leader)


def _send(folder: Path) -> None:
    files = sorted(folder.glob(SHARDS))
    distributed.send_object_list([{file.name: file.stat().st_size for file in files}], dst=0)
    for file in files:
        with file.open("rb") as source:
            while piece := source.read(PIECE):
                distributed.send(torch.frombuffer(bytearray(piece), dtype=torch.uint8), dst=0)


def _receive(folder: Path, leader: int) -> None:
    """Write what a machine's leader sends; it is heard to its end, whatever the disk says."""
    box: list[Any] = [None]
    distributed.recv_object_list(box, src=leader)
    failure: OSError | None = None
    for name, size in box[0].items():
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
            distributed.recv(piece, src=leader)
            try:
                with (folder / name).open("ab") as target:
                    target.write(piece.numpy())
            except OSError as error:
                failure = failure or error
    if failure is not None:
        raise failure


def _pack(folder: Path, file: Path) -> None:
    """Put all into one file; each part is deleted once it is there."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for part in sorted(folder.iterdir()):
            archive.write(part, part.name)
            part.unlink()


def _unpack(file: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if fnmatch(name, SHARDS)])


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return what the parts hold together, by key."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return cast(dict[str, TensorStorageMetadata], stored)
