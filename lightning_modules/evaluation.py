"""Models side by side on held-out data: what each finds probable, answers and prefers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_modules.base_model import attach_adapter, find_base, merge_adapter, unpacked
from lightning_modules.data.batches import Arrangement
from lightning_modules.data.content import RawDataset, blocks
from lightning_modules.data.tokenize import check_bad_rows, tokenize_rows
from lightning_modules.engine.lora import use_fast_adapters
from lightning_modules.engine.prepare import speed_up
from lightning_modules.exact_match import Question, answers_of, is_right, questions_of
from lightning_modules.inputs import read
from lightning_modules.kept import Kept
from lightning_modules.models import (
    DTYPES,
    cap_sequence_length,
    effective_dtype,
    load_config,
    load_model,
    load_tokenizer,
)
from lightning_modules.objective import language_model
from lightning_modules.probes import check_logits
from lightning_modules.registry import METHODS, Method
from lightning_modules.scoring import Scored, score
from post_training.errors import DataError
from post_training.schemas.evaluation import EvaluationConfig, EvaluationSpec, ExampleValues
from post_training.schemas.requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from post_training.schemas.trainer import BASE_FOLDER

log = logging.getLogger(__name__)

ROWS, PAIRS = METHODS[SupervisedFineTuneRequest.method], METHODS[PreferenceOptimizeRequest.method]


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    :param arrangement: how batches are laid out for it.
    :param length: its longest sequence in tokens.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    arrangement: Arrangement
    length: int


@dataclass(frozen=True)
class Findings:
    """What one model made of the data, by the rows' numbers."""

    rows: dict[int, Scored]
    pairs: dict[int, Scored] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What came of an evaluation.

    :param values: of each model, by the examples that all of them could take.
    :param questions: the rows that were answered, by their numbers.
    :param answers: of each model, by the same numbers.
    """

    values: dict[str, ExampleValues]
    questions: dict[int, Question]
    answers: dict[str, dict[int, str]]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The metrics of each model."""
        return {name: values.metrics() for name, values in self.values.items()}


def evaluate(spec: EvaluationSpec) -> Comparison:
    """Measure one model after the other; only one is in memory.

    :raises DataError: if the data cannot be read, or nothing of it can be used by all models.
    :raises ModelError: if a model cannot be loaded.
    """
    config, kept = spec.config, Kept.of(spec)
    rows = read(spec, spec.data)
    pairs = None if spec.preference_data is None else read(spec, spec.preference_data)
    questions = _questions(config, rows)
    found = {}
    for name, source in spec.models.items():
        log.info("evaluating %s: %s", name, source)
        subject = load_subject(spec, source, kept)
        found[name] = Findings(dict(_scored(config, subject, rows, ROWS)))
        if pairs is not None:
            found[name].pairs.update(_scored(config, subject, pairs, PAIRS))
        if config.exact_match is not None:
            model, limit = language_model(subject.model), config.exact_match.max_new_tokens
            found[name].answers.update(
                answers_of(
                    model, subject.tokenizer, questions, max_new_tokens=limit, batch_size=config.batch_size
                )
            )
    return compare(config, found, questions)


def load_subject(spec: EvaluationSpec, source: str, kept: Kept) -> Subject:
    """Load a model; its last adapter stays beside the weights, as in the training that made it.

    :raises ModelError: if it cannot be found or read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[effective_dtype(spec.config.dtype, device)]
    base = find_base(source, spec.work_dir / BASE_FOLDER, spec.tracking, spec.model_roots)
    base = unpacked(base, kept)
    tokenizer, config = load_tokenizer(base.tokenizer_source), load_config(base.source, quantized=True)
    length = cap_sequence_length(config, spec.config.max_seq_length)
    if getattr(config, "quantization_config", None) is not None:
        # Its scales stay in the type in which it was quantized.
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    model = load_model(base.source, dtype=dtype, config=config)
    for adapter in base.adapters[:-1]:
        model = merge_adapter(model, adapter)
    model = model.to(device)  # type: ignore[arg-type]
    check_logits(model)
    trees = speed_up(model, "sdpa", length, device=device)
    whole: nn.Module = attach_adapter(model, base.adapters[-1]) if base.adapters else model
    use_fast_adapters(whole)
    return Subject(whole.eval(), tokenizer, Arrangement.TREE if trees else Arrangement.PADDED, length)


def _questions(config: EvaluationConfig, rows: RawDataset) -> dict[int, Question]:
    if config.exact_match is None:
        return {}
    limits = [limit for limit in (config.max_examples, config.exact_match.max_examples) if limit is not None]
    asked = chain.from_iterable(blocks(rows, min(limits, default=None)))
    return questions_of(asked, ROWS.conversations[config.data_format.value])


def _scored(
    config: EvaluationConfig, subject: Subject, dataset: RawDataset, method: Method
) -> Iterator[tuple[int, Scored]]:
    """Yield what a model makes of each usable row, by its number; a block of rows in memory at a time.

    :raises DataError: if more rows are bad than may be.
    """
    bad: dict[int, str] = {}
    for block in blocks(dataset, config.max_examples):
        tokenized = tokenize_rows(
            block,
            subject.tokenizer,
            method.conversations[config.data_format.value],
            max_seq_length=subject.length,
            vocab_size=language_model(subject.model).config.get_text_config().vocab_size,
        )
        bad |= tokenized.bad
        check_bad_rows(dataset, bad, config.max_bad_row_fraction, "config.max_bad_row_fraction")
        found = score(
            subject.model,
            [method.item(*examples) for examples in tokenized.rows],
            batch_size=config.batch_size,
            pad_id=cast(int, subject.tokenizer.pad_token_id),
            arrangement=subject.arrangement,
        )
        numbers = (row.number for row in block if row.number not in tokenized.bad)
        yield from zip(numbers, found, strict=True)


def compare(
    config: EvaluationConfig, found: Mapping[str, Findings], questions: Mapping[int, Question]
) -> Comparison:
    """Reduce findings to the examples that all models could take; rewards are relative to the first model.

    The margin of a pair is β·((log π(chosen) − log ref(chosen)) − (log π(rejected) − log ref(rejected))):
    Rafailov et al., https://arxiv.org/abs/2305.18290, section 4.

    :raises DataError: if there is no such row, or no such pair.
    """
    rows = _common([of_model.rows for of_model in found.values()], "dataset_id")
    pairs = []
    if config.preference_dataset_id is not None:
        pairs = _common([of_model.pairs for of_model in found.values()], "preference_dataset_id")
    reference = next(iter(found.values()))
    asked = {number: questions[number] for number in rows if number in questions}

    def values_of(of_model: Findings) -> ExampleValues:
        margins = [of_model.pairs[number].margin - reference.pairs[number].margin for number in pairs]
        return ExampleValues(
            nll=[-of_model.rows[number].log_probs[0] for number in rows],
            tokens=[of_model.rows[number].tokens[0] for number in rows],
            correct=_correct(config, of_model.answers, asked),
            reward_margin=[config.beta * margin for margin in margins],
        )

    values = {name: values_of(of_model) for name, of_model in found.items()}
    return Comparison(values, asked, {name: of_model.answers for name, of_model in found.items()})


def _common(found: Sequence[Mapping[int, Scored]], name: str) -> list[int]:
    numbers = sorted(set.intersection(*map(set, found)))
    if not numbers:
        raise DataError(f"no row of {name} can be used by all models")
    return numbers


def _correct(
    config: EvaluationConfig, answers: Mapping[int, str], asked: Mapping[int, Question]
) -> list[bool]:
    if config.exact_match is None:
        return []
    pattern = config.exact_match.pattern
    return [is_right(pattern, answers[number], question.expected) for number, question in asked.items()]
