"""What a job will need, said before its first step, and compared with what it used at its end."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, cast

import lightning.pytorch as pl
from transformers import PreTrainedModel

from lightning_modules.callbacks import TrainingProgress, duration, peak_bytes
from lightning_modules.checkpoint import RESUME_FILE, readable_step
from lightning_modules.data.batches import PADDING
from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.memory_limits import Limit, device_limit, host_limit
from lightning_modules.memory_needs import Certain, activations, certain, scores_on_cpu
from lightning_modules.setting import Notices, Setting
from lightning_modules.speeds import Clock, Speed, Speeds, Stopwatch
from lightning_modules.workload import Workload, tokens_of
from post_training.errors import HardwareError
from post_training.schemas import record as names

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """Memory that is certain, and what the process held before it read anything, in bytes."""

    certain: Certain
    held: int


@dataclass(frozen=True)
class Estimate:
    """What a job will need.

    :param memory: peak in bytes: of the process, or on a GPU of the device.
    :param seconds: from here to the end of this attempt's fit; None is not known.
    """

    work: Workload
    n_epochs: int
    memory: int
    limit: Limit
    seconds: float | None

    @property
    def line(self) -> str:
        """One line of it."""
        work = self.work
        about = "" if work.exact else "about "
        of_rows = "" if work.exact else " (from the rows that are tokenized so far)"
        time_needed = "unknown before the first steps: no job of its kind was measured here yet"
        if self.seconds is not None:
            time_needed = duration(self.seconds)
        return (
            f"estimate: {work.steps} optimizer steps, {about}{work.tokens} tokens, {about}"
            f"{work.tokens // self.n_epochs} an epoch{of_rows}, {gib(self.memory)} of memory where"
            f" {gib(self.limit.bytes)} are {self.limit.what}, time {time_needed}"
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The same in numbers; the number of steps is a param."""
        known = {} if self.seconds is None else {names.METRIC_ESTIMATED_SECONDS: self.seconds}
        return known | {
            names.METRIC_ESTIMATED_TOKENS: float(self.work.tokens),
            names.METRIC_ESTIMATED_TOKENS_PER_EPOCH: self.work.tokens / self.n_epochs,
            names.METRIC_ESTIMATED_MEMORY_BYTES: float(self.memory),
        }


def gib(size: int) -> str:
    """Write bytes in GiB; small ones in MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def check_memory(setting: Setting, outline: PreTrainedModel, held: int) -> Needs:
    """Refuse what cannot fit whatever its batches are, before a weight is read.

    :param outline: the base model on the meta device.
    :param held: bytes that the process held when it began.
    :raises HardwareError: if the certain part is larger than all memory that the process can have.
    """
    needs, host, device = certain(setting, outline), _share(setting, host_limit()), _limit(setting)
    if needs.loading > host.bytes:
        _refuse(needs.loading, "its base model's weights", host, _remedies(setting))
    if needs.training > device.bytes:
        parts = (needs.weights, "weights"), (needs.gradients, "gradients"), (needs.optimizer, "optimizer")
        what = ", ".join(f"{gib(size)} {name}" for size, name in parts)
        quantized = setting.spec.request.adapters is not None and setting.spec.request.adapters.quantize_base
        _refuse(needs.training, what, device, _remedies(setting) + ["quantize_base"] * (not quantized))
    return Needs(needs, held)


def _limit(setting: Setting) -> Limit:
    """Return what this process can have on its device; those on CPUs have a part of their machine each."""
    limit = device_limit(setting.device)
    return _share(setting, limit) if setting.device == "cpu" else limit


def _share(setting: Setting, limit: Limit) -> Limit:
    processes = setting.ranks.local_world
    if processes == 1:
        return limit
    return Limit(limit.bytes // processes, f"for each of {processes} processes of {limit.what}")


def _refuse(size: int, what: str, limit: Limit, remedies: list[str]) -> NoReturn:
    raise HardwareError(
        f"the job needs at least {size} bytes of memory ({gib(size)}: {what}) and can have {limit.bytes}"
        f" ({gib(limit.bytes)}: {limit.what}): {' or '.join(remedies)} would need less; batch_size,"
        " max_seq_length and enable_activation_checkpointing change only what comes on top of that"
    )


def _remedies(setting: Setting) -> list[str]:
    """Name what would make the certain part smaller."""
    found = ["a smaller base model"]
    if setting.spec.request.adapters is None:
        found.append("LoRA adapters instead of every weight")
    if setting.algorithm.weights.frozen_base and setting.dtype == "fp32":
        found.append("dtype bf16")
    return found


def estimate_of(
    setting: Setting,
    data: FineTuningData,
    work: Workload,
    outline: PreTrainedModel,
    needs: Needs,
    speed: Speed | None,
) -> Estimate:
    """Put together what is known before the first step.

    :param work: of the data as it will be trained.
    :param speed: of earlier jobs of the kind; None where there was none.
    """
    training = setting.spec.request.training_config
    padded = data.train_loader.arrangement in PADDING
    activated = activations(setting, outline, work.largest, padded=padded)
    if setting.device == "cpu" and not padded:
        activated += scores_on_cpu(setting, outline, work.largest)
    accumulating = training.gradient_accumulation_steps > 1
    memory = peak_of_training(needs.certain, activated, accumulating=accumulating)
    if setting.device == "cpu":
        file = outline.num_parameters() * outline.dtype.itemsize  # mapped while it is read
        memory = needs.held + max(memory, needs.certain.loading + file)
    seconds = None if speed is None else _seconds(setting, data, work, speed)
    return Estimate(work, training.n_epochs, memory, _limit(setting), seconds)


def peak_of_training(needs: Certain, activated: int, *, accumulating: bool) -> int:
    """Return the most bytes of a step.

    :param activated: bytes of activations.
    :param accumulating: whether gradients lie there beside the activations of the next micro-batch; else they
        come as the activations go.
    """
    both = needs.gradients + activated if accumulating else max(needs.gradients, activated)
    return needs.weights + needs.optimizer + both


def _seconds(setting: Setting, data: FineTuningData, work: Workload, speed: Speed) -> float:
    """Return how long what is left will take: steps, validations, and the reference's log-probabilities."""
    epochs = setting.spec.request.training_config.n_epochs
    done = (readable_step(setting.spec.work_dir / RESUME_FILE) or 0) if setting.spec.begun else 0
    validations = epochs - done // len(data.train_loader) + (done == 0)
    forward = tokens_of(data.validated) * validations
    train = data.train_loader.shards
    if setting.reference_once and train.without_reference(0, [0]):
        rows = [(train, number, list(range(count))) for number, count in enumerate(train.counts)]
        forward += min(tokens_of(rows), work.tokens) + tokens_of(data.validated)
    training = work.tokens * (work.steps - done) / work.steps
    return training / speed.training + forward / (speed.forward or speed.training)


class Comparison(pl.Callback):
    """Says at a fit's end how good its estimate was, and keeps its speed for later ones."""

    def __init__(
        self, estimate: Estimate, speeds: Speeds, stopwatch: Stopwatch, clock: Clock = time.monotonic
    ) -> None:
        self._estimate, self._speeds, self._stopwatch, self._clock = estimate, speeds, stopwatch, clock
        self._began = clock()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare, of a fit that ended well."""
        module, expected = cast(TrainingProgress, pl_module), self._estimate
        used = peak_bytes(pl_module.device)
        seconds = "an unknown time" if expected.seconds is None else duration(expected.seconds)
        log.info(
            "estimated and used: %d and %d tokens, %s and %s of memory, %s and %s",
            expected.work.tokens,
            module.tokens_seen,
            gib(expected.memory),
            gib(used),
            seconds,
            duration(self._clock() - self._began),
        )
        if (speed := self._stopwatch.speed()) is not None:
            self._speeds.add(speed)


def announce(
    setting: Setting,
    data: FineTuningData,
    work: Workload,
    outline: PreTrainedModel,
    needs: Needs,
    speeds: Speeds,
    record: JobRecord,
    notices: Notices,
) -> list[pl.Callback]:
    """Say what the job will need; return what compares it with what it will have used.

    A retry repeats it in its log alone: the record keeps the first at step 0.
    """
    estimate = estimate_of(setting, data, work, outline, needs, speeds.median())
    log.info(estimate.line)
    record.log_metrics(estimate.metrics, step=0)
    if estimate.memory > estimate.limit.bytes:
        notices.add(
            f"the job may need {gib(estimate.memory)} of memory and can have {gib(estimate.limit.bytes)}"
            f" ({estimate.limit.what}): a lower batch_size or max_seq_length, or"
            " enable_activation_checkpointing, would need less"
        )
    if not setting.ranks.first:
        return []
    stopwatch = Stopwatch(processes=setting.ranks.world)
    return [stopwatch, Comparison(estimate, speeds, stopwatch)]
