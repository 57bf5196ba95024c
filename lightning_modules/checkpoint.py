"""What is kept of a training: exports for use, and the state that a retry goes on from."""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_modules.means import perplexity
from lightning_modules.module import NLL, STATE_KEY, PostTraining
from lightning_modules.process import StopRequestedError
from lightning_modules.ranks import ALONE, Ranks
from lightning_modules.sharded_state import is_sharded, read_rest, read_whole
from lightning_modules.trained import rename_whole
from post_training.schemas import record as names
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric
from post_training.schemas.trainer import RESUME_FOLDER
from post_training.schemas.training import RuntimeConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

EXPORTS = "checkpoints"
RESUME_FILE = Path(RESUME_FOLDER, "last.ckpt")

SAVE_INTERVAL_SECONDS = 60.0
SAVE_SHARE = 0.02
"""If nothing else is asked for, the resume state is saved each minute within an epoch, or so rarely that it
takes 2 % of the time."""


@dataclass(frozen=True)
class SaveInterval:
    """How often the resume state is saved within an epoch; both may be given.

    :param steps: optimizer steps between two saves; None does not count them.
    :param seconds: time between two; None does not look at the clock.
    :param share: largest part of the time that saving by the clock may take.
    """

    steps: int | None = None
    seconds: float | None = SAVE_INTERVAL_SECONDS
    share: float = SAVE_SHARE

    @classmethod
    def of(cls, runtime: RuntimeConfig) -> SaveInterval:
        """Read it from a request."""
        steps, minutes = runtime.save_every_n_steps, runtime.save_every_n_minutes
        if minutes is not None:
            return cls(steps, 60 * minutes, share=1.0)
        return cls() if steps is None else cls(steps, None)

    def pause(self, took: float) -> float:
        """Return the seconds until the clock asks for the next save.

        :param took: seconds that the last one took.
        """
        return math.inf if self.seconds is None else max(self.seconds, took / self.share)


def export(
    write: Callable[[Path], None],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    describe: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write what was trained in the ecosystem's own format, complete or not at all.

    :param write: writes the weights into the folder that it is given.
    :param describe: writes beside them, and beside the tokenizer, what they are.
    :param folder: replaced if it is there, from an attempt that was cut off.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    tokenizer.save_pretrained(temporary)
    describe(temporary)
    _replace(temporary, folder)


def weights_size(folder: Path) -> int:
    """Return the bytes on disk of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def copy_folder(source: Path, target: Path) -> Path:
    """Copy a folder, complete or not at all, and return the copy."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    _replace(temporary, target)
    return target


def _replace(temporary: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a rename cannot replace a folder that holds files
    os.replace(temporary, folder)


def unmoved(folder: Path) -> Path:
    """Return a folder whose path, once resolved, still leads where it led when it was allowed.

    :raises NotADirectoryError: if a symbolic link has come to stand in it since.
    """
    if folder.resolve() != folder:
        raise NotADirectoryError(f"checkpoint_dir has become a symbolic link to elsewhere: {folder.name}")
    return folder


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest exports under a folder."""
    exports = sorted(parent.glob("epoch-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in exports[:-keep]:
        shutil.rmtree(path)


def random_state() -> dict[str, Any]:
    """Take the state of this process's random generators, in types that ``weights_only`` loading accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(keys)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every random generator where :func:`random_state` found it."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


def readable_step(file: Path) -> int | None:
    """Return the optimizer steps of a resume state, and remove it if it cannot be read; None where none is.

    Its tensors are not read.
    """
    if not file.exists():
        return None
    try:
        state = (
            read_rest(file)
            if is_sharded(file)
            else torch.load(file, mmap=True, weights_only=True, map_location="cpu")
        )
        return int(state[STATE_KEY]["optimizer_steps"])
    except Exception as error:  # what torch raises depends on where the file is damaged
        log.warning("the state %s cannot be read and is removed: %s", file, error)
        file.unlink()
        return None


class FileCheckpointIO(TorchCheckpointIO):
    """Writes straight to the file, Lightning's own holds a second copy of everything in memory first.

    It reads what divided weights have left, too.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; whoever needs it whole or not at all renames it afterwards."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:  # given a path, torch does not say that the disk is full
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        if is_sharded(Path(path)):
            return read_whole(Path(path))
        return super().load_checkpoint(path, *args, **options)


class Checkpoints(CheckpointCallback):
    """Exports and records the weights at each epoch's end, and saves the state for a retry.

    A :class:`lightning.pytorch.callbacks.Checkpoint`, so Lightning calls it after the other callbacks.

    :param work_dir: the job's folder.
    :param copies: folder that receives a copy of each export, or None.
    :param keep: exports kept in each place, newest first; None keeps all.
    :param write: writes the model's trained weights into a folder.
    :param describe: writes what a checkpoint with these metrics is into its folder.
    :param upload: epochs whose checkpoint is uploaded: all, True for the last one, False for none.
    :param inputs: digest of what is trained, by which the record knows the resume state.
    :param ranks: the processes that train, all of which have these callbacks; the first one writes.
    :param whole: gives the first one the model to write, in all processes; where devices hold parts of it,
        these are gathered.
    """

    def __init__(
        self,
        *,
        work_dir: Path,
        inputs: str = "",
        interval: SaveInterval = SaveInterval(),
        copies: Path | None,
        keep: int | None,
        tokenizer: PreTrainedTokenizerBase,
        record: JobRecord,
        write: Callable[[nn.Module, Path], None],
        describe: Callable[[Path, PostTrainingMetric], None] = lambda folder, metrics: None,
        upload: bool | Literal["all"] = "all",
        clock: Callable[[], float] = time.monotonic,
        ranks: Ranks = ALONE,
        whole: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
    ) -> None:
        self.ranks = ranks
        self.whole = whole
        self.write = write
        self.describe = describe
        self.upload = upload
        self.inputs = inputs
        self.interval = interval
        self.exports = work_dir / EXPORTS
        self.resume_file = work_dir / RESUME_FILE
        self.copies = copies
        self.keep = keep
        self.tokenizer = tokenizer
        self.record = record
        self.clock = clock
        self.saved: list[Checkpoint] = []
        self._random_state: dict[str, Any] | None = None
        self._next_save = clock() + interval.pause(0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the random numbers of the attempt before."""
        if self._random_state is not None:
            restore_random_state(self._random_state)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the resume state as often as was asked for, and when the process is to stop.

        :raises StopRequestedError: after saving, if the process is to stop.
        """
        module = cast(PostTraining, pl_module)
        stop = module.should_stop()
        last = batch_idx + 1 == module.steps_per_epoch  # the epoch's end saves, after its validation
        counted = self.interval.steps is not None and module.optimizer_steps % self.interval.steps == 0
        due = not last and (stop or counted or self.clock() >= self._next_save)
        asked, wanted = self.ranks.sums([float(stop), float(due)])  # of one process, all must do it
        if wanted:
            self._save_resume_state(trainer, module)
        if asked:
            raise StopRequestedError

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export, record, copy, prune, and save the resume state."""
        module = cast(PostTraining, pl_module)
        module.stop_if_asked()
        upload = self._is_uploaded(trainer.current_epoch, trainer.max_epochs)
        if upload or self.copies is not None:
            self._keep(module, trainer.current_epoch, upload=upload)
        self._prune()
        self._save_resume_state(trainer, module, epoch_end=True)

    def uploaded(self, epochs: int | None) -> list[int]:
        """Return the epochs whose saved checkpoints were handed to the record, of so many epochs in all."""
        return [saved.epoch for saved in self.saved if self._is_uploaded(saved.epoch, epochs)]

    def _is_uploaded(self, epoch: int, epochs: int | None) -> bool:
        return self.upload == "all" or (self.upload and epoch + 1 == epochs)

    def _keep(self, module: PostTraining, epoch: int, *, upload: bool) -> None:
        folder = self.exports / f"epoch-{epoch}"
        metrics = checkpoint_metrics(module, epoch)
        with self.whole(module.model) as model:
            if not self.ranks.first:
                return
            export(
                lambda into: self.write(model, into),
                self.tokenizer,
                folder,
                lambda into: self.describe(into, metrics),
            )
        size = weights_size(folder)
        log.info("checkpoint of epoch %d: %.1f MB of weights", epoch, size / 1e6)
        module.log_metrics({names.METRIC_CHECKPOINT_BYTES: float(size)})
        if upload:
            self.saved.append(
                self.record.log_checkpoint(folder, step=module.optimizer_steps, metrics=metrics)
            )
        if self.copies is not None:
            unmoved(self.copies).mkdir(parents=True, exist_ok=True)
            copy = copy_folder(folder, self.copies / folder.name)
            if not upload:
                self.saved.append(self.record.note_checkpoint(copy, metrics=metrics))

    def _prune(self) -> None:
        if self.keep is None or not self.ranks.first:
            return
        prune(self.exports, self.keep)
        if self.copies is not None:
            prune(unmoved(self.copies), self.keep)
        for checkpoint in self.saved[: -self.keep]:
            self.record.discard_checkpoint(checkpoint)
        self.saved = self.saved[-self.keep :]

    def _save_resume_state(
        self, trainer: pl.Trainer, module: PostTraining, *, epoch_end: bool = False
    ) -> None:
        started = self.clock()
        if self._write_resume_state(trainer, must=epoch_end):
            self.record.log_state(
                self.resume_file, step=module.optimizer_steps, inputs=self.inputs, must=epoch_end
            )
        now = self.clock()
        self._next_save = now + self.interval.pause(now - started)

    def _write_resume_state(self, trainer: pl.Trainer, *, must: bool) -> bool:
        """Replace the resume state, or say that the disk refused and leave the older one.

        :raises OSError: when the disk refuses a state that must be.
        """
        draft = self.resume_file.with_suffix(".tmp")
        try:
            try:
                trainer.save_checkpoint(draft, weights_only=False)
            except OSError:
                trainer.strategy.barrier()  # where the others wait for what was written
                raise
            if self.ranks.first:
                rename_whole(draft, self.resume_file)
        except OSError as error:
            draft.unlink(missing_ok=True)
            if must:
                raise
            log.warning("the state was not saved, the one before stays: %s", error)
            return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the processes' random states and the checkpoints so far; Lightning saves it."""
        saved = [checkpoint.model_dump_json() for checkpoint in self.saved]
        first, *others = self.ranks.gathered(random_state())
        return {"random": first, "random_of_others": others, "saved": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both back; the random state is set when training begins, unless there were fewer processes."""
        states = [state_dict["random"], *state_dict.get("random_of_others", ())]
        self._random_state = states[self.ranks.rank] if self.ranks.rank < len(states) else None
        self.saved = [Checkpoint.model_validate_json(text) for text in state_dict["saved"]]


def checkpoint_metrics(module: PostTraining, epoch: int) -> PostTrainingMetric:
    """Return a checkpoint's four metrics; without validation they carry the epoch's training."""
    train_loss = module.epoch_means.mean(names.METRIC_TRAIN_LOSS)
    of_training = {
        names.METRIC_VALIDATION_LOSS: train_loss,
        names.METRIC_PERPLEXITY: perplexity(module.epoch_means.mean(NLL)),
    }
    metrics = of_training | module.metrics
    return PostTrainingMetric(
        epoch=epoch,
        train_loss=train_loss,
        validation_loss=metrics[names.METRIC_VALIDATION_LOSS],
        perplexity=metrics[names.METRIC_PERPLEXITY],
    )
