"""One supervised fine-tuning job, from its spec to its checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import lightning.pytorch as pl
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.attention import use_by_sequence
from lightning_modules.checkpoint import RESUME_FILE, Checkpoints, FileCheckpointIO
from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.data.reading import read_dataset
from lightning_modules.data.tokenize import Example, tokenize_dataset
from lightning_modules.models import (
    DTYPES,
    cap_sequence_length,
    load_config,
    load_model,
    load_tokenizer,
)
from lightning_modules.optimization import Schedule, default_optimizer
from lightning_modules.probes import check_logits, check_packing
from lightning_modules.setting import Notices, Setting
from lightning_modules.supervised import SupervisedFineTuning
from post_training.schemas.jobs import Checkpoint
from post_training.schemas.trainer import TrainerSpec
from post_training.schemas.training import TrainingConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

INPUTS_FILE = Path("resume", "inputs.json")

DEFAULT_STEPS_PER_EPOCH = TrainingConfig.model_fields["max_steps_per_epoch"].default


@dataclass(frozen=True)
class Finished:
    """What a training that ran to its end has made."""

    checkpoints: list[Checkpoint]
    metrics: dict[str, float]


def run_job(
    spec: TrainerSpec,
    record: JobRecord,
    callbacks: Sequence[pl.Callback] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Finished:
    """Train as the spec says, going on from an earlier attempt's state if there is one.

    :raises PostTrainingError: if data, model or machine do not allow it.
    :raises StopRequestedError: if ``should_stop`` became true.
    """
    setting = Setting.of(spec)
    notices = Notices(record)
    pl.seed_everything(setting.runtime.seed, verbose=False)
    tokenizer = load_tokenizer(spec.model)
    config = load_config(spec.model)
    length = cap_sequence_length(config, setting.runtime.max_seq_length)
    data, digests = build_data(setting, tokenizer, length, record, notices)
    if not continues(spec, digests):
        record.start_over()
    model = build_model(setting, config, length)
    module = build_module(setting, model, data, record, should_stop)
    checkpoints = Checkpoints(
        work_dir=spec.work_dir,
        copies=spec.checkpoint_dir,
        keep=setting.runtime.save_total_limit,
        tokenizer=tokenizer,
        record=record,
    )
    _log_params(setting, module, data, record)
    trainer = build_trainer(setting, [*callbacks, checkpoints])
    fit(trainer, module, data, spec)
    return Finished(checkpoints.saved, module.metrics)


def build_data(
    setting: Setting, tokenizer: PreTrainedTokenizerBase, length: int, record: JobRecord, notices: Notices
) -> tuple[FineTuningData, list[str]]:
    """Read, tokenize and arrange the rows; return them and the digests of what was read.

    :param length: the longest sequence in tokens.
    :raises DataError: if they cannot be read or are bad.
    """
    training, data, runtime = setting.spec.request.training_config, setting.data, setting.runtime
    train, digest = _examples(setting, setting.spec.train_data, "training", tokenizer, length, record)
    digests = [digest]
    if setting.spec.validation_data is not None and training.max_validation_steps != 0:
        source = setting.spec.validation_data
        validation, digest = _examples(setting, source, "validation", tokenizer, length, record)
        digests.append(digest)
    else:
        validation = train
    module = FineTuningData(
        train,
        validation,
        pad_id=tokenizer.pad_token_id,
        batch_size=data.batch_size,
        validation_batches=training.max_validation_steps,
        max_seq_length=length,
        packed=bool(data.packed),
        accumulation=training.gradient_accumulation_steps,
        shuffle=data.shuffle,
        seed=runtime.seed,
        steps_per_epoch=training.max_steps_per_epoch,
    )
    _give_notice(setting, module, notices)
    return module, digests


def continues(spec: TrainerSpec, digests: list[str]) -> bool:
    """Whether the job's folder holds the state of this very training, or none; another's is removed.

    A job whose data changed between two attempts trains from the start, as it would have without the first.

    :param digests: of the data that was read.
    """
    inputs = spec.work_dir / INPUTS_FILE
    resume_file = spec.work_dir / RESUME_FILE
    request = spec.request.model_dump(mode="json", exclude={"job_uuid"})
    current = json.dumps({"request": request, "model": spec.model, "data": digests}, sort_keys=True)
    same = not inputs.exists() or inputs.read_text() == current
    if not same:
        log.warning("the data or the request changed since the last attempt: training from the start")
        resume_file.unlink(missing_ok=True)
    inputs.parent.mkdir(parents=True, exist_ok=True)
    inputs.write_text(current)
    return same


def _examples(
    setting: Setting,
    source: str,
    context: Literal["training", "validation"],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    record: JobRecord,
) -> tuple[list[Example], str]:
    dataset = read_dataset(source)
    examples = tokenize_dataset(
        dataset,
        tokenizer,
        data_format=setting.data.data_format.value,
        max_seq_length=length,
        train_on_input=bool(setting.data.train_on_input),
        max_bad_row_fraction=setting.runtime.max_bad_row_fraction,
    )
    name = setting.data.dataset_id if context == "training" else setting.data.validation_dataset_id
    if name is None or ":" in name:  # a URI may hold the rows themselves, or a secret
        name = dataset.source
    record.log_dataset(
        name=name,
        digest=dataset.digest,
        source=dataset.source,
        rows=len(dataset.rows),
        context=context,
    )
    log.info("%s data: %d rows, %d tokens", context, len(examples), sum(map(len, examples)))
    return examples, dataset.digest


def _give_notice(setting: Setting, data: FineTuningData, notices: Notices) -> None:
    """Say what the request's defaults have done that its author may not expect."""
    training, loader = setting.spec.request.training_config, data.train_loader
    if training.max_steps_per_epoch == DEFAULT_STEPS_PER_EPOCH and len(loader) < loader.whole_epoch:
        notices.add(
            f"max_steps_per_epoch is {DEFAULT_STEPS_PER_EPOCH}, its default: each epoch trains {len(loader)}"
            f" of its {loader.whole_epoch} steps; 0 is the whole epoch"
        )
    if training.max_validation_steps == 0:
        notices.add("max_validation_steps is 0: validation_loss of the checkpoints is the epoch's train_loss")
    elif setting.spec.validation_data is None:
        notices.add(
            f"no validation_dataset_id: validation_loss is measured on the first {len(data.val_dataloader())}"
            " batches of the training data itself"
        )


def build_model(setting: Setting, config: PretrainedConfig, length: int) -> nn.Module:
    """Load the base model and make it ready to train, in training mode.

    :param length: the longest sequence in tokens.
    :raises ModelError: if it cannot be loaded, adapted, or trained in the way that was asked.
    """
    spec = setting.spec
    model: PreTrainedModel = load_model(
        spec.model,
        dtype=DTYPES[setting.dtype] if setting.algorithm.frozen_base else torch.float32,
        attn_implementation=setting.runtime.attn_implementation,
        config=config,
    )
    check_logits(model)
    if setting.data.packed:
        use_by_sequence(model, length)
        check_packing(model)
    if setting.efficiency.enable_activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return setting.algorithm.prepare(model, spec.request.algorithm_config, spec.model).train()


def build_module(
    setting: Setting,
    model: nn.Module,
    data: FineTuningData,
    record: JobRecord,
    should_stop: Callable[[], bool],
) -> SupervisedFineTuning:
    """Put model, optimizer and schedule together."""
    training = setting.spec.request.training_config
    steps_per_epoch = len(data.train_loader)
    total = steps_per_epoch * training.n_epochs
    optimizer = training.optimizer_config or default_optimizer(setting.algorithm.learning_rate, total)
    return SupervisedFineTuning(
        model,
        optimizer_config=optimizer,
        schedule=Schedule(optimizer.lr, optimizer.num_warmup_steps, total, setting.runtime.scheduler),
        steps_per_epoch=steps_per_epoch,
        record=record,
        dtype_name=setting.dtype,
        log_every_n_steps=setting.logger.log_every_n_steps,
        offload_activations=bool(setting.efficiency.enable_activation_offloading),
        should_stop=should_stop,
    )


def build_trainer(setting: Setting, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Make Lightning's trainer: one device, no logger of its own, no progress bar."""
    training = setting.spec.request.training_config
    return pl.Trainer(
        accelerator=setting.device,
        devices=1,
        precision=setting.precision,
        max_epochs=training.n_epochs,
        limit_val_batches=0 if training.max_validation_steps == 0 else None,
        callbacks=callbacks,
        plugins=[FileCheckpointIO()],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # tensors that the model caches in validation must serve training too
        use_distributed_sampler=False,
        default_root_dir=setting.spec.work_dir,
    )


def fit(trainer: pl.Trainer, module: SupervisedFineTuning, data: FineTuningData, spec: TrainerSpec) -> None:
    """Measure the untrained model, then train; or go on from the resume state if there is one."""
    resume_file = spec.work_dir / RESUME_FILE
    if resume_file.exists():
        log.info("attempt %d goes on from %s", spec.attempt, resume_file)
        trainer.fit(module, datamodule=data, ckpt_path=resume_file, weights_only=True)
        return
    if spec.request.training_config.max_validation_steps != 0:
        trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)


def _log_params(
    setting: Setting, module: SupervisedFineTuning, data: FineTuningData, record: JobRecord
) -> None:
    parameters = list(module.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    record.log_params(
        {
            "effective_dtype": setting.dtype,
            "device": setting.device,
            "trainable_parameters": trained,
            "total_parameters": total,
            "steps": module.steps_total,
            "training_rows": len(data.train_loader.rows),
            "seed": setting.runtime.seed,
            "learning_rate": module.optimizer_config.lr,
            "num_warmup_steps": module.schedule.warmup,
        }
    )
    log.info(
        "training %d of %d parameters in %s on %s, %d optimizer steps",
        trained,
        total,
        setting.dtype,
        setting.device,
        module.steps_total,
    )
