"""What is kept of a training: exports for use, and the state that a retry goes on from."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_modules.losses import perplexity
from lightning_modules.module import NLL, PostTraining, StopRequestedError
from post_training.schemas import record as names
from post_training.schemas.jobs import Checkpoint, PostTrainingMetric

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

EXPORTS = "checkpoints"
RESUME_FILE = Path("resume", "last.ckpt")

SAVE_INTERVAL_SECONDS = 60.0
SAVE_SHARE = 0.02
"""Within an epoch the resume state is saved each minute, or so rarely that it takes 2 % of the time."""


def export(write: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what was trained in the ecosystem's own format, complete or not at all.

    :param write: writes the weights into the folder that it is given.
    :param folder: replaced if it is there, from an attempt that was cut off.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    tokenizer.save_pretrained(temporary)
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


def prune(parent: Path, keep: int) -> None:
    """Remove all but the newest exports under a folder."""
    exports = sorted(parent.glob("epoch-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in exports[:-keep]:
        shutil.rmtree(path)


def remove_exports(parent: Path) -> None:
    """Remove every export under a folder."""
    for path in parent.glob("epoch-*"):
        shutil.rmtree(path)


def random_state() -> dict[str, Any]:
    """Take the state of every random generator, in types that ``weights_only`` loading accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(keys)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every random generator where :func:`random_state` found it."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


class FileCheckpointIO(TorchCheckpointIO):
    """Writes straight to the file; Lightning's own holds a second copy of everything in memory first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; whoever needs it whole or not at all renames it afterwards."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, path)


class Checkpoints(CheckpointCallback):
    """Exports and records the weights at each epoch's end, and saves the state for a retry.

    A :class:`lightning.pytorch.callbacks.Checkpoint`, so Lightning calls it after the other callbacks.

    :param work_dir: the job's folder.
    :param copies: folder that receives a copy of each export, or None.
    :param keep: exports kept in each place, newest first; None keeps all.
    :param write: writes the model's trained weights into a folder.
    :param upload: epochs whose checkpoint is uploaded: all, True for the last one, False for none.
    """

    def __init__(
        self,
        *,
        work_dir: Path,
        copies: Path | None,
        keep: int | None,
        tokenizer: PreTrainedTokenizerBase,
        record: JobRecord,
        write: Callable[[nn.Module, Path], None],
        upload: bool | Literal["all"] = "all",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.write = write
        self.upload = upload
        self.exports = work_dir / EXPORTS
        self.resume_file = work_dir / RESUME_FILE
        self.copies = copies
        self.keep = keep
        self.tokenizer = tokenizer
        self.record = record
        self.clock = clock
        self.saved: list[Checkpoint] = []
        self._random_state: dict[str, Any] | None = None
        self._next_save = clock() + SAVE_INTERVAL_SECONDS

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the random numbers of the attempt before."""
        if self._random_state is not None:
            restore_random_state(self._random_state)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the resume state now and then, and when the process is to stop.

        :raises StopRequestedError: after saving, if the process is to stop.
        """
        module = cast(PostTraining, pl_module)
        stop = module.should_stop()
        last = batch_idx + 1 == module.steps_per_epoch  # the epoch's end saves, after its validation
        if not last and (stop or self.clock() >= self._next_save):
            self._save_resume_state(trainer)
        if stop:
            raise StopRequestedError

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export, record, copy, prune, and save the resume state."""
        module = cast(PostTraining, pl_module)
        module.stop_if_asked()
        last = trainer.current_epoch + 1 == trainer.max_epochs
        upload = self.upload == "all" or (self.upload and last)
        if upload or self.copies is not None:
            self._keep(module, trainer.current_epoch, upload=upload)
        self._prune()
        self._save_resume_state(trainer)

    def _keep(self, module: PostTraining, epoch: int, *, upload: bool) -> None:
        folder = self.exports / f"epoch-{epoch}"
        export(lambda into: self.write(module.model, into), self.tokenizer, folder)
        size = weights_size(folder)
        log.info("checkpoint of epoch %d: %.1f MB of weights", epoch, size / 1e6)
        module.log_metrics({names.METRIC_CHECKPOINT_BYTES: float(size)})
        metrics = checkpoint_metrics(module, epoch)
        if upload:
            self.saved.append(
                self.record.log_checkpoint(folder, step=module.optimizer_steps, metrics=metrics)
            )
        if self.copies is not None:
            self.copies.mkdir(parents=True, exist_ok=True)
            copy = copy_folder(folder, self.copies / folder.name)
            if not upload:
                self.saved.append(self.record.note_checkpoint(copy, metrics=metrics))

    def _prune(self) -> None:
        if self.keep is None:
            return
        prune(self.exports, self.keep)
        if self.copies is not None:
            prune(self.copies, self.keep)
        for checkpoint in self.saved[: -self.keep]:
            self.record.discard_checkpoint(checkpoint)
        self.saved = self.saved[-self.keep :]

    def _save_resume_state(self, trainer: pl.Trainer) -> None:
        started = self.clock()
        temporary = self.resume_file.with_suffix(".tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        os.replace(temporary, self.resume_file)
        now = self.clock()
        self._next_save = now + max(SAVE_INTERVAL_SECONDS, (now - started) / SAVE_SHARE)

    def state_dict(self) -> dict[str, Any]:
        """Return the random state and the checkpoints so far; Lightning saves it."""
        saved = [checkpoint.model_dump_json() for checkpoint in self.saved]
        return {"random": random_state(), "saved": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both back; the random state is set when training begins."""
        self._random_state = state_dict["random"]
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
