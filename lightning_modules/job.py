"""One job, from its spec to its checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_modules.building import build_model, build_module, build_trainer, compile_if_long
from lightning_modules.checkpoint import RESUME_FILE, Checkpoints, SaveInterval
from lightning_modules.closing import Figures, SampleAnswers
from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.description import Description
from lightning_modules.estimate import announce
from lightning_modules.groundwork import Groundwork, lay_groundwork
from lightning_modules.module import PostTraining
from lightning_modules.ranks import ALONE, Ranks
from lightning_modules.references import compute_references
from lightning_modules.samples import SamplePrompts
from lightning_modules.setting import Setting
from lightning_modules.spread import Spread
from lightning_modules.workload import workload_of
from post_training.schemas.jobs import Checkpoint
from post_training.schemas.trainer import TrainerSpec

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
    ground = lay_groundwork(spec, record, should_stop, ranks)
    setting, data = ground.setting, ground.data
    before_weights()
    model, arrangement = build_model(setting, ground.base, ground.config, ground.length)
    if not ranks.first:  # every process has the same weights, and its own dropout
        pl.seed_everything(setting.runtime.seed + ranks.rank, verbose=False)
    data.arrange(arrangement)
    work = workload_of(data.train_loader, spec.request.training_config.n_epochs)
    compile_if_long(setting, model, work.tokens // ranks.world, ground.parameters)
    spread = Spread.of(setting, model)
    module = build_module(setting, model, data, record, should_stop, spread.shard)
    params = _trained_params(setting, module, data, ground.parameters)
    record.log_params(params)
    checkpoints = _checkpoints(ground, module, record, params, spread, clock)
    for notice in setting.algorithm.method.notices(spec.request):
        ground.notices.add(notice)
    if setting.logger.sample_prompts:
        callbacks = [*callbacks, SamplePrompts(setting.logger.sample_prompts, ground.tokenizer, record)]
    compared = announce(
        setting, data, work, ground.outline, ground.needs, ground.speeds, record, ground.notices
    )
    drawn = [Figures(record, spec.work_dir, data)] if setting.logger.log_figures else []
    closing = [*drawn, SampleAnswers(ground.questions, ground.tokenizer, record)]
    trainer = build_trainer(setting, [*callbacks, *compared, *closing, checkpoints], spread.strategy)
    return Job(setting, data, module, checkpoints, trainer)


def _checkpoints(
    ground: Groundwork,
    module: PostTraining,
    record: JobRecord,
    params: Mapping[str, object],
    spread: Spread,
    clock: Callable[[], float],
) -> Checkpoints:
    """Make what saves the state, and exports and uploads checkpoints.

    :param params: what only the trainer knows, for the model cards.
    """
    setting = ground.setting
    spec = setting.spec
    return Checkpoints(
        work_dir=spec.work_dir,
        inputs=ground.inputs,
        interval=SaveInterval.of(setting.runtime),
        copies=spec.checkpoint_dir,
        keep=setting.runtime.save_total_limit,
        tokenizer=ground.tokenizer,
        record=record,
        write=partial(setting.algorithm.weights.export, spec.request),
        describe=Description(
            ground.facts(params), type(module.language_model).__name__, ground.tokenizer, record
        ),
        upload=setting.logger.log_model,
        clock=clock,
        ranks=setting.ranks,
        whole=spread.whole,
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
