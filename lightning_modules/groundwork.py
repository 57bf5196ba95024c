"""What a job stands on before its weights are read: base, tokenizer, data, all of them checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.attempts import Inputs, begin, share_state
from lightning_modules.base_model import Base, find_base, identity_of, kept_beyond, meta_model, unpacked
from lightning_modules.checkpoint import RESUME_FILE
from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.estimate import Needs, check_memory
from lightning_modules.exact_match import Question
from lightning_modules.inputs import build_data, read_inputs, sample_questions, trained_on
from lightning_modules.kept import Kept
from lightning_modules.memory_limits import resident_bytes
from lightning_modules.model_card import Facts, TrainedOn
from lightning_modules.models import cap_sequence_length, load_config, load_tokenizer
from lightning_modules.ranks import Ranks
from lightning_modules.registry import WEIGHTS
from lightning_modules.setting import Notices, Setting
from lightning_modules.speeds import Speeds
from post_training.errors import ModelError
from post_training.record import run_params
from post_training.schemas.trainer import BASE_FOLDER, TrainerSpec
from post_training.schemas.training import RuntimeConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord


@dataclass(frozen=True)
class Groundwork:
    """What is known of a job without its weights.

    :param outline: the base model on the meta device.
    :param inputs: digest of what all attempts must have in common.
    :param length: the longest sequence, in tokens.
    :param speeds: how fast such jobs were here.
    :param seen: what is trained on, as the model card has it.
    :param questions: rows that the trained model answers, by their number.
    """

    setting: Setting
    base: Base
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    outline: PreTrainedModel
    needs: Needs
    inputs: str
    length: int
    speeds: Speeds
    data: FineTuningData
    seen: Sequence[TrainedOn]
    questions: Mapping[int, Question]
    notices: Notices

    @property
    def parameters(self) -> int:
        """How many the base model has."""
        return self.outline.num_parameters()

    def facts(self, params: Mapping[str, object]) -> Facts:
        """Put together what is the same on the model cards of all checkpoints.

        :param params: what only the trainer knows.
        """
        request, tracking = self.setting.spec.request, self.setting.spec.tracking
        return Facts(
            job_uuid=request.job_uuid,
            method=self.setting.algorithm.method.title,
            weights=self.setting.algorithm.weights.title,
            base=self.base.name,
            base_source=self.base.source,
            run_id=None if tracking is None else tracking.run_id,
            data=self.seen,
            settings={**run_params(request), **params},
        )


def lay_groundwork(
    spec: TrainerSpec, record: JobRecord, should_stop: Callable[[], bool], ranks: Ranks
) -> Groundwork:
    """Find the base, read the data, and begin the attempt with the state that it goes on from.

    :raises PostTrainingError: if data, model or machine do not allow the job.
    """
    held, kept = resident_bytes(), Kept.of(spec)
    with ranks.leaders_first():
        packed = find_base(spec.model, spec.work_dir / BASE_FOLDER, spec.tracking, spec.model_roots)
    setting = Setting.of(_with_export_form(spec, packed), ranks)
    pl.seed_everything(setting.runtime.seed, verbose=False)
    base = unpacked(packed, kept)
    if _leaves_adapter(setting):
        base = kept_beyond(spec.work_dir / BASE_FOLDER, base, kept)
    tokenizer, config = load_tokenizer(base.tokenizer_source), load_config(base.source)
    identity, outline = identity_of(packed), meta_model(config)
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
    return Groundwork(
        setting=setting,
        base=base,
        tokenizer=tokenizer,
        config=config,
        outline=outline,
        needs=needs,
        inputs=inputs.digest,
        length=length,
        speeds=Speeds.of(setting, kept, identity, length),
        data=build_data(setting, datasets, tokenizer, config, length, record, notices, kept, identity),
        seen=trained_on(setting, datasets),
        questions=sample_questions(setting, datasets, tokenizer, length),
        notices=notices,
    )


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
