"""The parts of a job that has been read: model, module, trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from lightning_modules.base_model import Base, merge_adapter
from lightning_modules.checkpoint import FileCheckpointIO
from lightning_modules.data.batches import Arrangement
from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.dropout import has_dropout, switch_off_dropout
from lightning_modules.engine.compiling import compile_layers, is_long
from lightning_modules.engine.lora import use_fast_adapters
from lightning_modules.engine.prepare import speed_up
from lightning_modules.models import DTYPES, load_model
from lightning_modules.module import PostTraining
from lightning_modules.objective import language_model
from lightning_modules.optimization import Schedule, default_optimizer
from lightning_modules.probes import check_logits, check_packing
from lightning_modules.setting import Setting
from lightning_modules.spread import environment
from post_training.schemas.requests import PreferenceOptimizeRequest

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)


def build_model(
    setting: Setting, base: Base, config: PretrainedConfig, length: int
) -> tuple[nn.Module, Arrangement]:
    """Load the base model and make it ready to train, in training mode.

    :param length: the longest sequence in tokens.
    :returns: the model, and how its batches are laid out.
    :raises ModelError: if it cannot be loaded, adapted, or trained in the way that was asked.
    """
    weights = setting.algorithm.weights
    model = load_model(
        base.source,
        dtype=DTYPES[setting.dtype] if weights.frozen_base else torch.float32,
        config=config,
    )
    for adapter in base.adapters:
        model = merge_adapter(model, adapter)
    check_logits(model)
    if isinstance(setting.spec.request, PreferenceOptimizeRequest):
        switch_off_dropout(model)
    takes_trees = speed_up(model, setting.runtime.attn_implementation, length, device=setting.device)
    if setting.data.packed and not takes_trees:
        check_packing(model)
    if setting.efficiency.enable_activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = weights.prepare(model, setting.spec.request, base.name).train()
    if isinstance(setting.spec.request, PreferenceOptimizeRequest):
        switch_off_dropout(trained)  # the adapters'
    use_fast_adapters(trained)
    if not takes_trees:
        return trained, Arrangement.PACKED if setting.data.packed else Arrangement.PADDED
    return trained, Arrangement.FLAT if has_dropout(trained) else Arrangement.TREE


def compile_if_long(setting: Setting, model: nn.Module, tokens: int, parameters: int) -> None:
    """Compile what trains adapters on a base that is not quantized; other weights have not been tried."""
    adapters = setting.spec.request.adapters
    if not setting.algorithm.weights.frozen_base or adapters is None or adapters.quantize_base:
        return
    if not is_long(tokens, parameters):
        return
    if setting.sharded:
        log.info("the job is long, but layers that are divided among devices are not compiled")
    else:
        compile_layers(language_model(model))


def build_module(
    setting: Setting,
    model: nn.Module,
    data: FineTuningData,
    record: JobRecord,
    should_stop: Callable[[], bool],
    shard: Callable[[nn.Module, DeviceMesh], None] | None = None,
) -> PostTraining:
    """Put model, objective, optimizer and schedule together."""
    training = setting.spec.request.training_config
    steps_per_epoch = len(data.train_loader)
    total = steps_per_epoch * training.n_epochs
    optimizer = training.optimizer_config or default_optimizer(setting.algorithm.learning_rate, total)
    return PostTraining(
        model,
        setting.algorithm.method.objective(setting.spec.request, setting.ranks),
        optimizer_config=optimizer,
        schedule=Schedule(optimizer.lr, optimizer.num_warmup_steps, total, setting.runtime.scheduler),
        steps_per_epoch=steps_per_epoch,
        record=record,
        dtype_name=setting.dtype,
        log_every_n_steps=setting.logger.log_every_n_steps,
        offload_activations=bool(setting.efficiency.enable_activation_offloading),
        should_stop=should_stop,
        ranks=setting.ranks,
        shard=shard,
    )


def build_trainer(
    setting: Setting, callbacks: list[pl.Callback], strategy: Strategy | Literal["auto"] = "auto"
) -> pl.Trainer:
    """Make Lightning's trainer: a device a process, no logger of its own, no progress bar."""
    training, ranks = setting.spec.request.training_config, setting.ranks
    trainer = pl.Trainer(
        accelerator=setting.device,
        devices=ranks.local_world,
        num_nodes=ranks.world // ranks.local_world,
        strategy=strategy,
        precision=setting.precision,
        max_epochs=training.n_epochs,
        limit_val_batches=0 if training.max_validation_steps == 0 else None,
        callbacks=callbacks,
        plugins=[FileCheckpointIO(), *environment(setting)],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # tensors that the model caches in validation must serve training too
        use_distributed_sampler=False,
        default_root_dir=setting.spec.work_dir,
    )
    if ranks.world > 1:
        # Lightning's handler of SIGTERM waits for the other processes in the midst of whatever they do.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
