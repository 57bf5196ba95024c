"""Supervised fine-tuning: learn the next token of the scored positions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.data.datamodule import Batch
from lightning_modules.losses import perplexity, scored_hidden, token_loss_sum
from lightning_modules.optimization import Schedule, make_optimizer
from lightning_modules.probes import hidden_states
from post_training.errors import DivergenceError
from post_training.schemas import record as names
from post_training.schemas.training import OptimizerConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

STATE_KEY = "supervised_fine_tuning"


class StopRequestedError(Exception):
    """The process was asked to stop; the optimizer step under way was dropped."""


class SupervisedFineTuning(pl.LightningModule):
    """Full or adapter fine-tuning of a causal language model.

    A batch is the list of one optimizer step's micro-batches. Its loss is the sum of the scored
    tokens' cross-entropies over the number of scored tokens in the whole list, so that accumulation
    changes memory and not the result.

    :param model: the model, its trained parameters requiring gradients.
    :param optimizer_config: optimizer, peak rate and weight decay.
    :param schedule: learning rate of each step; its total is the job's number of steps.
    :param steps_per_epoch: optimizer steps in an epoch.
    :param record: where the metrics go.
    :param dtype_name: ``bf16``, ``fp16`` or ``fp32``, as it is reported.
    :param log_every_n_steps: optimizer steps between two points of the training metrics.
    :param offload_activations: keep activations in host memory between forward and backward.
    :param should_stop: asked between micro-batches; once true, training ends with an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer_config: OptimizerConfig,
        schedule: Schedule,
        steps_per_epoch: int,
        record: JobRecord,
        dtype_name: str,
        log_every_n_steps: int = 1,
        offload_activations: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint holds the trained weights only
        self.model = model
        self.optimizer_config = optimizer_config
        self.schedule = schedule
        self.steps_per_epoch = steps_per_epoch
        self.steps_total = schedule.total
        self.record = record
        self.dtype_name = dtype_name
        self.log_every_n_steps = log_every_n_steps
        self.offload_activations = offload_activations
        self.should_stop = should_stop
        self.optimizer_steps = 0
        self.tokens_seen = 0
        self.last_loss = math.nan
        self.metrics: dict[str, float] = {}
        self.epoch_loss = TokenMean()
        self._window = TokenMean()
        self._validation = TokenMean()
        self._window_tokens = 0
        self._window_seconds = 0.0
        self._trained_seconds = 0.0
        self._trained_steps = 0

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, adapters inside."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(PreTrainedModel, model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer over the trained parameters."""
        return make_optimizer(self.model.parameters(), self.optimizer_config)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Sum the cross-entropy of a batch's scored tokens, in nats; a scalar in fp32."""
        model = self.language_model
        hidden = hidden_states(model, batch["input_ids"], batch.get("position_ids"), batch.get("layout"))
        selected, targets = scored_hidden(hidden, batch["labels"])
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return token_loss_sum(selected, targets, head, model.config.get_text_config())

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Make one optimizer step from its micro-batches.

        :raises StopRequestedError: if the process is to stop.
        :raises DivergenceError: if the loss is no longer a finite number.
        """
        started = time.perf_counter()
        scored = sum(micro["scored"] for micro in batch)
        total = torch.zeros((), device=self.device)
        for i, micro in enumerate(batch):
            if i > 0:  # a step that is not begun yet ends with a saved state, one half done is dropped
                self.stop_if_asked()
            with self._activations():
                loss = self.loss_sum(micro)
            self.manual_backward(loss / scored)
            total += loss.detach()
        loss_sum = float(total)
        if not math.isfinite(loss_sum):
            raise DivergenceError(
                f"the loss became {loss_sum} at optimizer step {self.optimizer_steps + 1}:"
                " a lower learning rate or dtype fp32 may help"
            )
        norm = self._optimizer_step()
        self._count(loss_sum, scored, sum(micro["tokens"] for micro in batch), time.perf_counter() - started)
        if self.optimizer_steps % self.log_every_n_steps == 0 or self.optimizer_steps == self.steps_total:
            self._log_training(norm)

    def stop_if_asked(self) -> None:
        """Raise if the process is to stop.

        :raises StopRequestedError: ends the fit; nothing catches it below the trainer's main.
        """
        if self.should_stop():
            raise StopRequestedError

    def _activations(self) -> AbstractContextManager[Any]:
        return (
            torch.autograd.graph.save_on_cpu(pin_memory=True) if self.offload_activations else nullcontext()
        )

    def _optimizer_step(self) -> float:
        """Set this step's rate, update the weights, and return the gradient's 2-norm before the update."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.optimizer_steps + 1)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if (scaler := getattr(self.trainer.precision_plugin, "scaler", None)) is not None:
            norm /= scaler.get_scale()
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def _count(self, loss_sum: float, scored: int, tokens: int, seconds: float) -> None:
        self.optimizer_steps += 1
        self.tokens_seen += tokens
        self.last_loss = loss_sum / scored
        self.epoch_loss.add(loss_sum, scored)
        self._window.add(loss_sum, scored)
        self._window_tokens += tokens
        self._window_seconds += seconds
        self._trained_seconds += seconds
        self._trained_steps += 1

    def _log_training(self, norm: float) -> None:
        """Log the metrics since the last point; the gradient norm is that of the newest step."""
        left = self.steps_total - self.optimizer_steps
        self.log_metrics(
            {
                names.METRIC_TRAIN_LOSS: self._window.mean,
                names.METRIC_LEARNING_RATE: self.schedule.rate(self.optimizer_steps),
                names.METRIC_GRADIENT_NORM: norm,
                names.METRIC_TOKENS_PER_SECOND: self._window_tokens / self._window_seconds,
                names.METRIC_TOKENS_SEEN: float(self.tokens_seen),
                names.METRIC_EPOCH: self.optimizer_steps / self.steps_per_epoch,
                names.METRIC_PROGRESS: self.optimizer_steps / self.steps_total,
                names.METRIC_SECONDS_LEFT: left * self._trained_seconds / self._trained_steps,
            }
        )
        self._window = TokenMean()
        self._window_tokens, self._window_seconds = 0, 0.0

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record metrics at the current optimizer step."""
        self.metrics.update(metrics)
        self.record.log_metrics(metrics, step=self.optimizer_steps)

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's mean loss."""
        self.epoch_loss = TokenMean()

    def on_validation_epoch_start(self) -> None:
        """Begin the validation's mean loss."""
        self._validation = TokenMean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the validation's mean over tokens."""
        self.stop_if_asked()
        self._validation.add(float(self.loss_sum(batch)), batch["scored"])

    def on_validation_epoch_end(self) -> None:
        """Record the validation's loss and perplexity."""
        loss = self._validation.mean
        self.log_metrics({names.METRIC_VALIDATION_LOSS: loss, names.METRIC_PERPLEXITY: perplexity(loss)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights only, and add the counters."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name in trained}
        checkpoint[STATE_KEY] = {
            "optimizer_steps": self.optimizer_steps,
            "tokens_seen": self.tokens_seen,
            "epoch_loss": [self.epoch_loss.total, self.epoch_loss.tokens],
            "metrics": dict(self.metrics),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters where they were left."""
        state = checkpoint[STATE_KEY]
        self.optimizer_steps = state["optimizer_steps"]
        self.tokens_seen = state["tokens_seen"]
        self.epoch_loss = TokenMean(*state["epoch_loss"])
        self.metrics = dict(state["metrics"])


class TokenMean:
    """A mean over tokens that arrives in sums."""

    def __init__(self, total: float = 0.0, tokens: int = 0) -> None:
        self.total = total
        self.tokens = tokens

    def add(self, total: float, tokens: int) -> None:
        """Add a sum over so many tokens."""
        self.total += total
        self.tokens += tokens

    @property
    def mean(self) -> float:
        """The mean so far; not a number before the first token."""
        return self.total / self.tokens if self.tokens else math.nan
