"""The training loop that every algorithm shares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from lightning_modules.callbacks import peak_bytes
from lightning_modules.data.batches import Batch
from lightning_modules.means import Means, Values, perplexity
from lightning_modules.objective import Objective, Outcome, language_model
from lightning_modules.offloading import offloaded
from lightning_modules.optimization import Schedule, make_optimizer
from lightning_modules.preference import reference_log_probs
from lightning_modules.process import StopRequestedError
from lightning_modules.ranks import ALONE, Ranks
from lightning_modules.sharding import whole
from post_training.errors import DivergenceError
from post_training.schemas import record as names
from post_training.schemas.training import OptimizerConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

STATE_KEY = "post_training"
NLL = "nll"


class PostTraining(pl.LightningModule):
    """Trains a causal language model on one objective.

    A batch is the list of one optimizer step's micro-batches. Its loss is the sum of the units' losses
    over the number of units in the whole list, so that accumulation changes memory and not the result, unless
    the objective itself compares the units of a micro-batch (kto_pair).

    Where several processes train, the units are those of all of them: their gradients, which the strategy
    averages, are then those of one process with all of the rows; so are the metrics.

    :param model: the model, its trained parameters requiring gradients.
    :param objective: the loss of a batch.
    :param optimizer_config: optimizer, peak rate and weight decay.
    :param schedule: learning rate of each step; its total is the job's number of steps.
    :param steps_per_epoch: optimizer steps in an epoch.
    :param record: where the metrics go.
    :param dtype_name: ``bf16``, ``fp16`` or ``fp32``, as it is reported.
    :param log_every_n_steps: optimizer steps between two points of the training metrics.
    :param offload_activations: keep activations in host memory between forward and backward.
    :param should_stop: asked between micro-batches; once true, training ends with an exception.
    :param ranks: the processes that train.
    :param shard: divides the model's weights among the devices of a mesh; None leaves each a whole model.
    :ivar distributions: by metric, the values of single units (n) in the last epoch or validation that ended.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        optimizer_config: OptimizerConfig,
        schedule: Schedule,
        steps_per_epoch: int,
        record: JobRecord,
        dtype_name: str,
        log_every_n_steps: int = 1,
        offload_activations: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        ranks: Ranks = ALONE,
        shard: Callable[[nn.Module, DeviceMesh], None] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds the trained weights only
        self.model = model
        self.objective = objective
        self.optimizer_config = optimizer_config
        self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch
        self.steps_total = schedule.total
        self.record = record
        self.dtype_name = dtype_name
        self.log_every_n_steps = log_every_n_steps
        self.offload_activations = offload_activations
        self.should_stop = should_stop
        self.ranks = ranks
        self._shard = shard
        self.optimizer_steps = 0
        self.tokens_seen = 0
        self.last_loss = math.nan
        self.metrics: dict[str, float] = {}
        self.epoch_means = Means()
        self.distributions: dict[str, Tensor] = {}
        self._epoch_values = Values()
        self._validation_values = Values()
        self._window = Means()
        self._validation = Means()
        self._window_tokens = 0
        self._window_seconds = 0.0
        self._first_began = 0.0
        self._trained_steps = 0

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, adapters inside."""
        return language_model(self.model)

    def configure_model(self) -> None:
        """Divide the weights among the devices, once; Lightning asks before each of its loops."""
        if self._shard is not None:
            shard, self._shard = self._shard, None
            shard(self.model, cast(DeviceMesh, self.device_mesh)["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer over the trained parameters."""
        return make_optimizer(self.model.parameters(), self.optimizer_config)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Make one optimizer step from its micro-batches.

        :raises StopRequestedError: if the process is to stop.
        :raises DivergenceError: if the loss is no longer a finite number.
        """
        started = time.perf_counter()
        if not self._trained_steps:
            self._first_began = started
        own = [float(sum(micro[name] for micro in batch)) for name in ("units", "tokens")]
        units, tokens = map(round, self.ranks.sums(own))
        step = Means()
        for i, micro in enumerate(batch):
            if i > 0:  # a step that is not begun yet ends with a saved state, one half done is dropped
                self.stop_if_asked()
            outcome = self._outcome(micro)
            with self._apart(last=i + 1 == len(batch)):
                self.manual_backward(outcome.loss / (units / self.ranks.world))  # the strategy averages
            _add(step, outcome, micro["units"])
            self._epoch_values.add(outcome.values)
        step = step.of_all(self.ranks)
        self.last_loss = step.mean(names.METRIC_TRAIN_LOSS)
        self._check_finite(self.last_loss, f"at optimizer step {self.optimizer_steps + 1}")
        norm = self._optimizer_step()
        self._count(step, tokens, time.perf_counter() - started)
        if self.optimizer_steps % self.log_every_n_steps == 0 or self.optimizer_steps == self.steps_total:
            self._log_training(norm)

    def _check_finite(self, loss: float, when: str) -> None:
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the loss became {loss} {when}: a lower learning rate or dtype fp32 may help"
            )

    def stop_if_asked(self) -> None:
        """Raise if one of the processes is to stop; all of them must ask.

        :raises StopRequestedError: ends the fit; nothing catches it below the trainer's main.
        """
        if self.ranks.any(self.should_stop()):
            raise StopRequestedError

    def _outcome(self, batch: Batch) -> Outcome:
        with self._activations() if torch.is_grad_enabled() else nullcontext():
            outcome = self.objective(self.model, batch)
        return outcome if batch["units"] else outcome.silent()

    def _apart(self, *, last: bool) -> AbstractContextManager[Any]:
        """Let the processes' gradients meet once a step, in the last micro-batch's backward pass."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, DDPStrategy):
            return nullcontext()
        return cast(AbstractContextManager[Any], strategy.block_backward_sync())

    def _activations(self) -> AbstractContextManager[Any]:
        return offloaded(self.model) if self.offload_activations else nullcontext()

    def _optimizer_step(self) -> float:
        """Set this step's rate, update the weights, and return the gradient's 2-norm before the update."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.optimizer_steps + 1)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
        if (scaler := getattr(self.trainer.precision_plugin, "scaler", None)) is not None:
            norm /= scaler.get_scale()
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def _count(self, step: Means, tokens: int, seconds: float) -> None:
        self.optimizer_steps += 1
        self.tokens_seen += tokens
        for name, total, count in step.sums():
            self.epoch_means.add(name, total, count)
            self._window.add(name, total, count)
        self._window_tokens += tokens
        self._window_seconds += seconds
        self._trained_steps += 1

    def _log_training(self, norm: float) -> None:
        """Log the metrics since the last point; the gradient norm is that of the newest step."""
        left = self.steps_total - self.optimizer_steps
        seconds_a_step = (time.perf_counter() - self._first_began) / self._trained_steps  # with validations
        self.log_metrics(
            {
                **{name: mean for name, mean in self._window.all().items() if name != NLL},
                names.METRIC_LEARNING_RATE: self.schedule.rate(self.optimizer_steps),
                names.METRIC_GRADIENT_NORM: norm,
                names.METRIC_TOKENS_PER_SECOND: self._window_tokens / self._window_seconds,
                names.METRIC_PEAK_MEMORY_BYTES: float(peak_bytes(self.device)),
                names.METRIC_TOKENS_SEEN: float(self.tokens_seen),
                names.METRIC_EPOCH: self.optimizer_steps / self.steps_per_epoch,
                names.METRIC_PROGRESS: self.optimizer_steps / self.steps_total,
                names.METRIC_SECONDS_LEFT: left * seconds_a_step,
            }
        )
        self._window = Means()
        self._window_tokens, self._window_seconds = 0, 0.0

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record metrics at the current optimizer step."""
        self.metrics.update(metrics)
        self.record.log_metrics(metrics, step=self.optimizer_steps)

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's means."""
        self.epoch_means = Means()
        self._epoch_values = Values()

    def on_train_epoch_end(self) -> None:
        """Keep the epoch's single values."""
        self.distributions |= self._epoch_values.of_all(self.ranks)

    def on_validation_epoch_start(self) -> None:
        """Begin the validation's means."""
        self._validation = Means()
        self._validation_values = Values()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the validation's means."""
        self.stop_if_asked()
        outcome = self._outcome(batch)
        _add(self._validation, outcome, batch["units"])
        self._validation_values.add(outcome.values)

    def on_validation_epoch_end(self) -> None:
        """Record the validation's loss, perplexity, and the objective's own metrics.

        :raises DivergenceError: if the last step left weights whose loss is no finite number.
        """
        means = self._validation.of_all(self.ranks).all()
        values = self._validation_values.of_all(self.ranks)
        self.distributions |= {f"{names.VALIDATION_PREFIX}{name}": each for name, each in values.items()}
        loss, nll = means.pop(names.METRIC_TRAIN_LOSS), means.pop(NLL)
        if self.optimizer_steps > 0:
            self._check_finite(loss, f"after optimizer step {self.optimizer_steps}")
        self.log_metrics(
            {
                names.METRIC_VALIDATION_LOSS: loss,
                names.METRIC_PERPLEXITY: perplexity(nll),
                **{f"{names.VALIDATION_PREFIX}{name}": mean for name, mean in means.items()},
            }
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the reference's log-probability of each scored token (n) of a batch that counts."""
        self.stop_if_asked()
        log_probs = reference_log_probs(self.model, batch)
        return log_probs if batch["units"] else log_probs[:0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only, and add the counters."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name in trained}
        checkpoint[STATE_KEY] = {
            "optimizer_steps": self.optimizer_steps,
            "tokens_seen": self.tokens_seen,
            "epoch_means": self.epoch_means.sums(),
            "window": [self._window.sums(), self._window_tokens, self._window_seconds],
            "metrics": dict(self.metrics),
            "epoch_values": self._epoch_values.of_all(self.ranks),
            "distributions": dict(self.distributions),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters where they were left."""
        state = checkpoint[STATE_KEY]
        self.optimizer_steps = state["optimizer_steps"]
        self.tokens_seen = state["tokens_seen"]
        self.epoch_means = Means(state["epoch_means"])
        sums, self._window_tokens, self._window_seconds = state["window"]
        self._window = Means(sums)
        self.metrics = dict(state["metrics"])
        self._epoch_values = Values(state.get("epoch_values", {}) if self.ranks.first else {})
        self.distributions = dict(state.get("distributions", {}))


def _add(means: Means, outcome: Outcome, units: int) -> None:
    means.add(names.METRIC_TRAIN_LOSS, outcome.loss.detach(), units)
    means.add(NLL, outcome.nll.total, outcome.nll.count)
    for name, value in outcome.metrics.items():
        means.add(name, value.total, value.count)
