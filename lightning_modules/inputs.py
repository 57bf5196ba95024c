"""A job's data: read, checked, tokenized, and what the user is told of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightning_modules.data.content import RawDataset, blocks
from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.data.naming import public_name
from lightning_modules.data.reading import read_dataset
from lightning_modules.data.shards import TokenizedRows, Tokenizing
from lightning_modules.data.sources import Limits
from lightning_modules.exact_match import Question, questions_of
from lightning_modules.generation import prompt_ids
from lightning_modules.kept import Kept
from lightning_modules.model_card import TrainedOn
from lightning_modules.setting import Notices, Setting
from post_training.schemas.evaluation import WorkerSpec
from post_training.schemas.trainer import TrainerSpec
from post_training.schemas.training import DataConfig, TrainingConfig

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

Context = Literal["training", "validation"]

ANSWERED_ROWS, LOOKED_AT_ROWS = 3, 50
"""How many rows the trained model answers, and among how many these are looked for."""

LONGEST_QUESTION = 1024
"""Tokens: an answer costs each job memory and time, also where nobody looks."""

DEFAULT_STEPS_PER_EPOCH = TrainingConfig.model_fields["max_steps_per_epoch"].default


def read_inputs(spec: TrainerSpec) -> dict[Context, RawDataset]:
    """Read what the job trains and validates on; validation is left out where it is the training data.

    :raises DataError: if it cannot be read.
    """
    sources: dict[Context, str] = {"training": spec.train_data}
    if spec.validation_data is not None and spec.request.training_config.max_validation_steps != 0:
        sources["validation"] = spec.validation_data
    return {context: read(spec, source) for context, source in sources.items()}


def trained_on(setting: Setting, datasets: Mapping[Context, RawDataset]) -> list[TrainedOn]:
    """Return what people may see of the job's data sets."""
    return [
        TrainedOn(
            context,
            public_name(_name(setting.data, context, dataset)),
            dataset.digest,
            len(dataset.rows),
        )
        for context, dataset in datasets.items()
    ]


def sample_questions(
    setting: Setting, datasets: Mapping[Context, RawDataset], tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[int, Question]:
    """Return the first questions of the validation data, else of the training data, by their row's number.

    :param length: the longest prompt in tokens.
    :returns: none where the request has prompts of its own, be they none, or holds the rows itself, which the
        record withholds.
    """
    dataset = datasets.get("validation", datasets["training"])
    if setting.logger.sample_prompts is not None or dataset.source.startswith("data:"):
        return {}
    rows = next(iter(blocks(dataset, LOOKED_AT_ROWS)), [])
    found = questions_of(rows, setting.algorithm.method.conversations[setting.data.data_format.value])
    fitting = {
        number: each
        for number, each in found.items()
        if _fits(each, tokenizer, min(length, LONGEST_QUESTION))
    }
    return dict(islice(fitting.items(), ANSWERED_ROWS))


def _fits(question: Question, tokenizer: PreTrainedTokenizerBase, length: int) -> bool:
    try:
        return len(prompt_ids(tokenizer, question.messages, question.tools)) <= length
    except Exception:  # a template raises what it likes; such a row is bad, and is reported as that
        return False


def _name(data: DataConfig, context: Context, dataset: RawDataset) -> str:
    """Return a data set's id, or where it lies: a URI in its place may hold the rows, or a secret."""
    dataset_id = data.dataset_id if context == "training" else data.validation_dataset_id
    return dataset.source if dataset_id is None or ":" in dataset_id else dataset_id


def read(spec: WorkerSpec, source: str) -> RawDataset:
    """Read a data set within a process's limits.

    :raises DataError: if it cannot be read.
    """
    tracking_uri = spec.tracking.tracking_uri if spec.tracking is not None else None
    limits = Limits(spec.max_data_bytes, folder=spec.work_dir)
    return read_dataset(source, tracking_uri, spec.model_roots, limits)


def build_data(
    setting: Setting,
    datasets: Mapping[Context, RawDataset],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    length: int,
    record: JobRecord,
    notices: Notices,
    kept: Kept,
    model: Sequence[str],
) -> FineTuningData:
    """Tokenize and arrange the rows, and put on the record what they are.

    :param config: the model's.
    :param length: the longest sequence in tokens.
    :param model: what tells the base model from others.
    :raises DataError: if they are bad.
    """
    training, data = setting.spec.request.training_config, setting.data
    vocab_size = config.get_text_config().vocab_size
    reader = _Reader(setting, tokenizer, vocab_size, length, record, notices, kept)
    rows = {context: reader.rows(dataset, context) for context, dataset in datasets.items()}
    if setting.reference_once:
        adapters = setting.spec.request.adapters
        quantized = adapters is not None and adapters.quantize_base
        for one in rows.values():
            one.keep_references([list(model), setting.dtype, setting.device, quantized])
    train = rows["training"]
    module = FineTuningData(
        train,
        rows.get("validation", train),
        pad_id=tokenizer.pad_token_id,
        batch_size=data.batch_size,
        validation_batches=training.max_validation_steps,
        max_seq_length=length,
        packed=bool(data.packed),
        accumulation=training.gradient_accumulation_steps,
        shuffle=data.shuffle,
        seed=setting.runtime.seed,
        steps_per_epoch=training.max_steps_per_epoch,
        share=setting.share,
    )
    _give_notice(setting, module, notices)
    if setting.ranks.leader:  # the others find its files
        module.make_ahead()
    return module


class _Reader:
    """Makes of data sets what one job trains on."""

    def __init__(
        self,
        setting: Setting,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        length: int,
        record: JobRecord,
        notices: Notices,
        kept: Kept,
    ) -> None:
        self._setting = setting
        self._record = record
        self._notices = notices
        self._kept = kept
        method, data = setting.algorithm.method, setting.data
        self._tokenizing = Tokenizing(
            tokenizer,
            f"{type(setting.spec.request).__name__} {data.data_format.value}",
            method.conversations[data.data_format.value],
            method.item,
            max_seq_length=length,
            vocab_size=vocab_size,
            train_on_input=bool(data.train_on_input),
        )

    def rows(self, dataset: RawDataset, context: Context) -> TokenizedRows:
        """Tokenize what has to be known before training.

        That is the first shard; and all of them where their numbers of rows, or of packed rows, are not known
        before: then it is not known how many steps an epoch has.
        """
        fraction = self._setting.runtime.max_bad_row_fraction
        rows = TokenizedRows(
            dataset, self._tokenizing, self._kept, fraction, partial(self._log_bad_rows, context)
        )
        whole = fraction > 0 or (context == "training" and bool(self._setting.data.packed))
        for number in range(len(rows.counts) if whole else 1):
            rows.make(number)
        skipped = rows.check()
        if skipped is not None:
            self._log_bad_rows(context, rows.bad)
            self._notices.add(skipped)
        if rows.cut:
            looked_at = "" if rows.all_made else f"first {rows.counts[0]} of "
            self._notices.add(
                f"{rows.cut} of the {looked_at}{sum(rows.counts)} {context} rows are longer than"
                f" max_seq_length ({self._tokenizing.max_seq_length} tokens) and were cut at their end"
            )
        self._log_dataset(dataset, context)
        tokens = sum(rows[0].lengths)
        log.info(
            "%s data: %d rows, the first %d with %d tokens", context, sum(rows.counts), rows.counts[0], tokens
        )
        return rows

    def _log_bad_rows(self, context: Context, bad: Mapping[int, str]) -> None:
        self._record.log_table(f"bad_{context}_rows.json", ["row", "reason"], sorted(bad.items()))

    def _log_dataset(self, dataset: RawDataset, context: Context) -> None:
        self._record.log_dataset(
            name=_name(self._setting.data, context, dataset),
            digest=dataset.digest,
            source=dataset.source,
            rows=len(dataset.rows),
            context=context,
        )


def _give_notice(setting: Setting, data: FineTuningData, notices: Notices) -> None:
    """Say what the request's defaults have done that its author may not expect."""
    training, loader = setting.spec.request.training_config, data.train_loader
    if training.max_steps_per_epoch == DEFAULT_STEPS_PER_EPOCH and len(loader) < loader.whole_epoch:
        notices.add(
            f"max_steps_per_epoch is {DEFAULT_STEPS_PER_EPOCH}, its default: each epoch trains {len(loader)}"
            f" of its {loader.whole_epoch} steps; 0 is the whole epoch"
        )
    if training.max_validation_steps == 0:
        unread = ", and validation_dataset_id is not read" if setting.spec.validation_data is not None else ""
        notices.add(
            f"max_validation_steps is 0: validation_loss of the checkpoints is the epoch's train_loss{unread}"
        )
    elif setting.spec.validation_data is None:
        notices.add(
            f"no validation_dataset_id: validation_loss is measured on the first {len(data.val_dataloader())}"
            " batches of the training data itself"
        )
