"""One job, from its spec to its checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from lightning_modules.attempts import Inputs, begin, share_state
from lightning_modules.base_model import (
    Base,
    find_base,
    identity_of,
    kept_beyond,
    merge_adapter,
    meta_model,
    unpacked,
)
from lightning_modules.checkpoint import (
    RESUME_FILE,
    Checkpoints,
    FileCheckpointIO,
    SaveInterval,
)
from lightning_modules.closing import Figures, SampleAnswers
from lightning_modules.data.batches import Arrangement
from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.data.loaders import Seen
from lightning_modules.data.shards import Shards
from lightning_modules.description import Description
from lightning_modules.dropout import has_dropout, switch_off_dropout
from lightning_modules.engine.compiling import compile_layers, is_long
from lightning_modules.engine.lora import use_fast_adapters
from lightning_modules.engine.prepare import speed_up
from lightning_modules.estimate import announce, check_memory
from lightning_modules.inputs import build_data, read_inputs, sample_questions, trained_on
from lightning_modules.kept import Kept
from lightning_modules.memory_limits import resident_bytes
from lightning_modules.model_card import Facts, TrainedOn
from lightning_modules.models import DTYPES, cap_sequence_length, load_config, load_model, load_tokenizer
from lightning_modules.module import PostTraining
from lightning_modules.objective import language_model
from lightning_modules.optimization import Schedule, default_optimizer
from lightning_modules.probes import check_logits, check_packing
from lightning_modules.ranks import ALONE, Ranks
from lightning_modules.registry import WEIGHTS
from lightning_modules.samples import SamplePrompts
from lightning_modules.setting import Notices, Setting
from lightning_modules.speeds import Speeds
from lightning_modules.spread import Spread
from lightning_modules.workload import workload_of
from post_training.errors import ModelError
from post_training.record import run_params
from post_training.schemas.jobs import Checkpoint
from post_training.schemas.requests import PreferenceOptimizeRequest
from post_training.schemas.trainer import BASE_FOLDER, TrainerSpec
from post_training.schemas.training import RuntimeConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What a training that ran to its end has made.

    :param uploaded: epochs of the checkpoints that were handed to the record.
    """

    checkpoints: list[Checkpoint]
    uploaded: list[int]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Job:
    """Everything that one attempt trains with."""

    setting: Setting
    data: FineTuningData
    module: PostTraining
    checkpoints: Checkpoints
    trainer: pl.Trainer

    def run(self) -> Finished:
        """Measure the untrained model, then train; or go on from the resume state if there is one.

        :raises DivergenceError: if the loss is no longer a finite number.
        :raises StopRequestedError: if the process was asked to stop.
        """
        spec, trainer = self.setting.spec, self.trainer
        try:
            self._train(trainer, spec)
        finally:
            self.data.close()
        epochs = spec.request.training_config.n_epochs
        return Finished(self.checkpoints.saved, self.checkpoints.uploaded(epochs), self.module.metrics)

    def _train(self, trainer: pl.Trainer, spec: TrainerSpec) -> None:
        if self.setting.reference_once:
            compute_references(trainer, self.module, self.data, spec.request.training_config.n_epochs)
        resume_file = spec.work_dir / RESUME_FILE
        if resume_file.exists():
            log.info("attempt %d goes on from %s", spec.attempt, resume_file)
            trainer.fit(self.module, datamodule=self.data, ckpt_path=resume_file, weights_only=True)
        else:
            if spec.request.training_config.max_validation_steps != 0:
                trainer.validate(self.module, datamodule=self.data, verbose=False)
            trainer.fit(self.module, datamodule=self.data)


def prepare_job(
    spec: TrainerSpec,
    record: JobRecord,
    callbacks: Sequence[pl.Callback] = (),
    should_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    before_weights: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Job:
    """Read data and model, and put together what trains as the spec says.

    What can be known without the weights is checked before they are read.

    :param clock: tells when the resume state is saved.
    :param before_weights: called when all is checked, and the weights are read.
    :param ranks: the processes that train; all of them prepare the job.
    :raises PostTrainingError: if data, model or machine do not allow it.
    """
    held, kept = resident_bytes(), Kept.of(spec)
    with ranks.leaders_first():
        base = find_base(spec.model, spec.work_dir / BASE_FOLDER, spec.tracking, spec.model_roots)
    setting = Setting.of(_with_export_form(spec, base), ranks)
    pl.seed_everything(setting.runtime.seed, verbose=False)
    packed, base = base, unpacked(base, kept)
    if _leaves_adapter(setting):
        base = kept_beyond(spec.work_dir / BASE_FOLDER, base, kept)
    tokenizer, config = load_tokenizer(base.tokenizer_source), load_config(base.source)
    identity = identity_of(packed)
    outline = meta_model(config)
    setting.algorithm.weights.check(outline, setting.spec.request)
    needs = check_memory(setting, outline, held)
    with ranks.leaders_first():
        datasets = read_inputs(spec)
    inputs = Inputs.of(spec, identity, [dataset.digest for dataset in datasets.values()])
    if ranks.first:
        begin(spec, inputs, record, should_stop)
    share_state(ranks, spec.work_dir / RESUME_FILE)
    notices = Notices(record)
    length = cap_sequence_length(config, setting.runtime.max_seq_length)
    if length < setting.runtime.max_seq_length:
        notices.add(f"runtime.max_seq_length is {length}, as many positions as the model has")
    data = build_data(setting, datasets, tokenizer, config, length, record, notices, kept, identity)
    seen = trained_on(setting, datasets)
    questions = sample_questions(setting, datasets, tokenizer, length)
    del datasets  # before the weights: rows that were read from json or csv may take much memory
    before_weights()
    model, arrangement = build_model(setting, base, config, length)
    if not ranks.first:  # every process has the same weights, and its own dropout
        pl.seed_everything(setting.runtime.seed + ranks.rank, verbose=False)
    data.arrange(arrangement)
    work = workload_of(data.train_loader, spec.request.training_config.n_epochs)
    _compile_if_long(setting, model, work.tokens // ranks.world, outline.num_parameters())
    spread = Spread.of(setting, model)
    module = build_module(setting, model, data, record, should_stop, spread.shard)
    params = _trained_params(setting, module, data, outline.num_parameters())
    record.log_params(params)
    checkpoints = Checkpoints(
        work_dir=spec.work_dir,
        inputs=inputs.digest,
        interval=SaveInterval.of(setting.runtime),
        copies=spec.checkpoint_dir,
        keep=setting.runtime.save_total_limit,
        tokenizer=tokenizer,
        record=record,
        write=partial(setting.algorithm.weights.export, setting.spec.request),
        describe=Description(
            _facts(setting, base, seen, params), type(module.language_model).__name__, tokenizer, record
        ),
        upload=setting.logger.log_model,
        clock=clock,
        ranks=ranks,
        whole=spread.whole,
    )
    for notice in setting.algorithm.method.notices(spec.request):
        notices.add(notice)
    if setting.logger.sample_prompts:
        samples = SamplePrompts(setting.logger.sample_prompts, tokenizer, record)
        callbacks = [*callbacks, samples]
    speeds = Speeds.of(setting, kept, identity, length)
    compared = announce(setting, data, work, outline, needs, speeds, record, notices)
    closing = [Figures(record, spec.work_dir, data), SampleAnswers(questions, tokenizer, record)]
    trainer = build_trainer(setting, [*callbacks, *compared, *closing, checkpoints], spread.strategy)
    return Job(setting, data, module, checkpoints, trainer)


def _leaves_adapter(setting: Setting) -> bool:
    """Whether the checkpoints are adapters, which need their base."""
    return setting.algorithm.weights is WEIGHTS["LoRA"] and setting.runtime.export != "merged"


def _with_export_form(spec: TrainerSpec, base: Base) -> TrainerSpec:
    """Export adapters merged where their base is itself a merged model, which no one could load.

    :raises ModelError: if the request asks for the adapter alone.
    """
    if not base.adapters or spec.request.adapters is None:
        return spec
    runtime = spec.request.runtime or RuntimeConfig()
    if runtime.export == "adapter":
        raise ModelError(
            "runtime.export must be merged, got 'adapter': the job starts from an adapter, and the base of a"
            " new one would be a merged model that is kept nowhere"
        )
    merged = runtime.model_copy(update={"export": "merged"})
    return spec.model_copy(update={"request": spec.request.model_copy(update={"runtime": merged})})


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


def _compile_if_long(setting: Setting, model: nn.Module, tokens: int, parameters: int) -> None:
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
        plugins=[FileCheckpointIO()],
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


def compute_references(
    trainer: pl.Trainer, module: PostTraining, data: FineTuningData, n_epochs: int
) -> None:
    """Compute the reference's log-probabilities of all pairs that will be seen and have none.

    They are computed before the first optimizer step, of a full fine-tuning by the model itself, and kept for
    later attempts and other jobs.

    :raises StopRequestedError: if the process is to stop.
    """
    ranks = module.ranks
    for shards, number, indices in data.seen(n_epochs):
        if not _without_reference(ranks, shards, number, indices):
            continue
        with shards.computing_references(number, module.should_stop) if ranks.first else nullcontext():
            module.stop_if_asked()
            missing = _without_reference(ranks, shards, number, indices)
            if missing:
                log.info("computing the reference's log-probabilities of %d pairs", len(missing))
                log_probs = references_of(trainer, module, data, (shards, number, missing))
                with ranks.leaders_first():
                    if ranks.leader:
                        shards.set_references(number, missing, log_probs)
                    else:
                        shards.forget(number)


def _without_reference(ranks: Ranks, shards: Shards, number: int, indices: Sequence[int]) -> list[int]:
    """Return which pairs have no reference's log-probabilities on one of the machines."""
    found = ranks.gathered(shards.without_reference(number, indices))
    return sorted({index for missing in found for index in missing})


def references_of(
    trainer: pl.Trainer, module: PostTraining, data: FineTuningData, part: Seen
) -> torch.Tensor:
    """Return the reference's log-probabilities of pairs' scored tokens, one pair after the other (n)."""
    shards, number, indices = part
    own = torch.cat(cast(list[torch.Tensor], trainer.predict(module, data.batches_of([part])))).cpu()
    found = module.ranks.gathered(own)
    if len(found) == 1:
        return own
    of_pair: dict[int, torch.Tensor] = {}
    for rank, log_probs in enumerate(found):
        taken = data.taken_by(rank, indices)
        counts = [sum(len(s.scored_places) for s in shards[number][pair].sequences) for pair in taken]
        of_pair |= dict(zip(taken, torch.split(log_probs, counts), strict=True))
    return torch.cat([of_pair[index] for index in indices])


def _facts(setting: Setting, base: Base, seen: Sequence[TrainedOn], params: Mapping[str, object]) -> Facts:
    """Put together what is the same in all checkpoints."""
    request, tracking = setting.spec.request, setting.spec.tracking
    return Facts(
        job_uuid=request.job_uuid,
        method=setting.algorithm.method.title,
        weights=setting.algorithm.weights.title,
        base=base.name,
        base_source=base.source,
        run_id=None if tracking is None else tracking.run_id,
        data=seen,
        settings={**run_params(request), **params},
    )


def _trained_params(
    setting: Setting, module: PostTraining, data: FineTuningData, of_base: int
) -> dict[str, object]:
    """Return what only the trainer knows.

    :param of_base: parameters of the base model; of a 4-bit one its modules hold another number.
    """
    trained = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    total = of_base if setting.spec.request.adapters is None else of_base + trained
    log.info(
        "training %d of %d parameters in %s on %s, %d optimizer steps",
        trained,
        total,
        setting.dtype,
        setting.device,
        module.steps_total,
    )
    return {
        "effective_dtype": setting.dtype,
        "device": setting.device,
        "trainable_parameters": trained,
        "total_parameters": total,
        "steps": module.steps_total,
        "training_rows": sum(data.train_loader.shards.counts),
        "seed": setting.runtime.seed,
        "learning_rate": module.optimizer_config.lr,
        "num_warmup_steps": module.schedule.warmup,
    }
