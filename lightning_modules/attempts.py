"""What the attempts at a job hand on to each other, if they train the very same."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.checkpoint import RESUME_FILE, readable_step
from lightning_modules.ranks import Ranks
from lightning_modules.sharded_state import PIECE
from lightning_modules.trained import rename_whole, sha256_of, write_whole
from post_training.schemas.trainer import RESUME_FOLDER, TrainerSpec

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

INPUTS_FILE = Path(RESUME_FOLDER, "inputs.json")


@dataclass(frozen=True)
class Inputs:
    """What a job is trained from; two attempts that agree in it train the same.

    :param text: JSON of request, model and the data's digests.
    """

    text: str

    @classmethod
    def of(cls, spec: TrainerSpec, model: Sequence[str], digests: Sequence[str]) -> Inputs:
        """Describe a spec's.

        :param model: what its name stands for now: an alias may have moved, a folder been overwritten.
        :param digests: of the data that was read.
        """
        request = spec.request.model_dump(mode="json", exclude={"job_uuid"})
        content = {"request": request, "model": [spec.model, *model], "data": list(digests)}
        return cls(json.dumps(content, sort_keys=True))

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def inputs_here(work_dir: Path) -> Inputs | None:
    """Return what the state in a job's folder is trained from; None where there is none, or nobody knows."""
    try:
        text = (work_dir / INPUTS_FILE).read_text()
        json.loads(text)
    except (FileNotFoundError, ValueError):  # a disk that was full can leave an empty file
        return None
    return Inputs(text)


def begin(spec: TrainerSpec, inputs: Inputs, record: JobRecord, give_up: Callable[[], bool]) -> None:
    """Go on where the attempts before ended, or from the start where they left no state.

    :raises InputsChangedError: if they trained something else.
    :raises RecordUnavailableError: if training cannot begin without the record's answer.
    """
    before = inputs_here(spec.work_dir)
    record.begin(inputs.digest, here=before.digest if before is not None else None, give_up=give_up)
    keep_inputs(spec, inputs)
    fetch_newest_state(spec, inputs, record, give_up)


def keep_inputs(spec: TrainerSpec, inputs: Inputs) -> None:
    """Say whose state the folder holds from here on."""
    file = spec.work_dir / INPUTS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, inputs.text)


def share_state(ranks: Ranks, file: Path) -> None:
    """Give every machine the state that the first process goes on from; all processes wait for it."""
    if ranks.world == ranks.local_world:
        ranks.wait()
        return
    own = sha256_of(file) if file.exists() else None
    wanted = ranks.told(own)
    if not ranks.any(own != wanted):
        return
    missing = own != wanted and ranks.leader
    draft = file.with_suffix(".tmp")
    if missing:
        file.unlink(missing_ok=True)
        draft.parent.mkdir(parents=True, exist_ok=True)
    if wanted is not None:
        with draft.open("wb") if missing else nullcontext() as target:
            for piece in _pieces(ranks, file):
                if target is not None:
                    target.write(piece)
        if missing:
            rename_whole(draft, file)
    ranks.wait()


def _pieces(ranks: Ranks, file: Path) -> Iterator[bytes]:
    """Yield the first process's file in all processes, which hold a piece of it at a time."""
    size = ranks.told(file.stat().st_size if ranks.first else 0)
    with file.open("rb") if ranks.first else nullcontext() as source:
        for _ in range(0, size, PIECE):
            yield ranks.told(source.read(PIECE) if source is not None else b"")


def fetch_newest_state(
    spec: TrainerSpec, inputs: Inputs, record: JobRecord, give_up: Callable[[], bool]
) -> None:
    """Put the record's state into the job's folder where it is newer: an attempt ran on another machine.

    A state here that cannot be read is removed first.

    :raises RecordUnavailableError: if training cannot begin without the record's answer.
    """
    file = spec.work_dir / RESUME_FILE
    here = readable_step(file)
    several_nodes = spec.request.runtime is not None and spec.request.runtime.num_nodes > 1
    if not spec.begun and not several_nodes:  # the one with the state may have been lost, unknown to the rest
        return
    step = record.restore_state(file, step=here, inputs=inputs.digest, give_up=give_up)
    if step is not None:
        log.info("the state at step %d comes from the record", step)
