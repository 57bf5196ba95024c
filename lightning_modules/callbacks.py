"""What a fit tells while it runs and when it has ended: a line of progress, and what it used."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning.pytorch as pl
import torch

from lightning_modules.used import Used, most_used
from post_training.schemas.record import METRIC_DEVICE_SECONDS, METRIC_JOB_TOKENS, TAG_RESOURCES

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

Clock = Callable[[], float]


class TrainingProgress(Protocol):
    """What the callbacks read from the module that is trained."""

    tokens_seen: int
    """Tokens that went through the model, padding left out; only its growth is used."""
    steps_total: int
    """Optimizer steps of the whole job."""
    optimizer_steps: int
    """Optimizer steps done, those of earlier attempts included."""
    last_loss: float
    """Mean loss per scored token of the last step, in nats."""
    dtype_name: str
    """bf16, fp16 or fp32."""


def progress_line(
    *,
    step: int,
    steps_total: int,
    epoch: int,
    loss: float,
    tokens_per_second: float,
    seconds_left: float | None,
) -> str:
    """Write one line of progress, without its newline.

    :param epoch: counted from 0.
    :param seconds_left: None leaves the time out, where nothing is known yet.
    """
    line = (
        f"progress step {step}/{steps_total} epoch {epoch} loss {loss:.3f} tokens/s {tokens_per_second:.0f}"
    )
    return line if seconds_left is None else f"{line} time left {duration(seconds_left)}"


def duration(seconds: float) -> str:
    """Write a duration in its two largest units: 1m 40s."""
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minute}m"
    return f"{minute}m {second}s" if minute else f"{second}s"


class Progress(pl.Callback):
    """Prints a line at most every ``every_seconds`` seconds, and one at the end.

    Rates are those of this fit alone: a resumed job starts its clock anew.
    """

    def __init__(self, every_seconds: float = 5.0, clock: Clock = time.monotonic) -> None:
        self._every = every_seconds
        self._clock = clock
        self._started = self._printed_at = 0.0
        self._first_step = self._first_tokens = self._printed_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        module = _progress(pl_module)
        self._started = self._printed_at = self._clock()
        self._first_step = self._printed_step = module.optimizer_steps
        self._first_tokens = module.tokens_seen

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Print if a step was made and the last line is old enough."""
        due = self._clock() - self._printed_at >= self._every
        if due and _progress(pl_module).optimizer_steps > self._printed_step:
            self._print(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last step, unless its line is there."""
        if _progress(pl_module).optimizer_steps > self._printed_step:
            self._print(trainer, pl_module)

    def _print(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module = _progress(pl_module)
        self._printed_at = self._clock()
        self._printed_step = module.optimizer_steps
        elapsed = self._printed_at - self._started
        steps = module.optimizer_steps - self._first_step
        line = progress_line(
            step=module.optimizer_steps,
            steps_total=module.steps_total,
            epoch=trainer.current_epoch,
            loss=module.last_loss,
            tokens_per_second=_rate(module.tokens_seen - self._first_tokens, elapsed),
            seconds_left=elapsed / steps * (module.steps_total - module.optimizer_steps) if steps else None,
        )
        print(line, flush=True)


class Resources(pl.Callback):
    """Measures what an attempt used, and what all attempts at its job did.

    ``device_seconds`` are seconds times devices (a CPU is one), from the beginning of reading the base model
    to the end of the fit: the reference's log-probabilities and every validation are in them, reading the
    data and uploading are not. ``job_tokens`` went through an optimizer step, those of validations and of the
    reference left out; what was trained twice, since a state was lost, counts twice. Both are of all
    attempts at the job: each goes on from what the one before has told last, so that of one that is killed
    no more is lost than ``every_seconds``.

    The other figures are of this attempt's fit; read ``summary`` after it, or after its failure.

    :param record: holds them in a tag; None keeps them here.
    :param every_seconds: time between two looks at the clock that are recorded.
    """

    def __init__(
        self, record: JobRecord | None = None, clock: Clock = time.monotonic, every_seconds: float = 10.0
    ) -> None:
        self._record = record
        self._clock = clock
        self._every = every_seconds
        self._before = Used()
        self._began: float | None = None
        self._ended: float | None = None
        self._told_at = -math.inf
        self._devices = 1
        self._fit_began: float | None = None
        self._first_tokens = self._tokens = 0
        self._fit: dict[str, Any] = {}

    def begin(self) -> None:
        """Start the clock, from where the attempts before left it; the record must have begun."""
        if self._record is not None:
            self._before = most_used(self._record.left(TAG_RESOURCES))
        self._began = self._clock()
        self.tell()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See how many devices are used."""
        self._devices = trainer.world_size

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the fit's clock and the device's memory counter."""
        if self._began is None:
            self.begin()
        self._told_at = -math.inf  # the first step is told of
        self._fit_began = self._clock()
        self._first_tokens = _progress(pl_module).tokens_seen
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Count a step's tokens, and tell of them if it is time."""
        self._count(pl_module)
        self._tell_if_due()

    def on_validation_batch_end(self, *args: Any) -> None:
        """Tell of the time."""
        self._tell_if_due()

    def on_predict_batch_end(self, *args: Any) -> None:
        """Tell of the time."""
        self._tell_if_due()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the figures of a fit that ended well."""
        self._measure(pl_module)
        if self._record is not None:
            used = self.used()
            totals = {METRIC_DEVICE_SECONDS: used.device_seconds, METRIC_JOB_TOKENS: float(used.job_tokens)}
            self._record.log_metrics(totals, step=_progress(pl_module).optimizer_steps)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the figures of a fit that failed."""
        self._measure(pl_module)

    def used(self) -> Used:
        """Return what all attempts used up to now."""
        if self._began is None:
            return self._before
        until = self._clock() if self._ended is None else self._ended
        return self._before.plus((until - self._began) * self._devices, self._tokens)

    def summary(self) -> dict[str, Any]:
        """Device, dtype, bytes, seconds and tokens of the fit; before its end what the job used alone."""
        return self._fit | asdict(self.used())

    def tell(self) -> None:
        """Record what is known, unless nothing was used yet."""
        if self._record is not None and self._began is not None:
            self._record.set_tag(TAG_RESOURCES, json.dumps(self.summary()))

    def _tell_if_due(self) -> None:
        if self._record is not None and self._clock() - self._told_at >= self._every:
            self._told_at = self._clock()
            self.tell()

    def _count(self, pl_module: pl.LightningModule) -> None:
        self._tokens = _progress(pl_module).tokens_seen - self._first_tokens

    def _measure(self, pl_module: pl.LightningModule) -> None:
        self._ended = self._clock()
        if self._fit_began is None:  # it failed before it began
            return
        self._count(pl_module)
        seconds = self._ended - self._fit_began
        self._fit = {
            "device": _device_name(pl_module.device),
            "dtype": _progress(pl_module).dtype_name,
            "peak_memory_bytes": peak_memory_bytes(),
            "seconds": round(seconds, 3),
            "tokens": self._tokens,
            "tokens_per_second": round(_rate(self._tokens, seconds), 1),
        }
        if pl_module.device.type == "cuda":
            self._fit["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(pl_module.device)


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but for macOS


def peak_bytes(device: torch.device) -> int:
    """The most memory of a device that this process has held at once; on a CPU, of the machine's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def _progress(module: pl.LightningModule) -> TrainingProgress:
    return cast(TrainingProgress, module)
