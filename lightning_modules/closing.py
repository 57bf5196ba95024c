"""What a job adds to its record when it has trained: pictures, and answers to rows of its data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_modules.data.datamodule import FineTuningData
from lightning_modules.exact_match import Question, answers_of
from lightning_modules.figures import FIGURES, curves_figure, distributions_figure, save
from lightning_modules.module import PostTraining
from lightning_modules.process import StopRequestedError
from post_training.schemas import record as names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)

LOSS, LEARNING_RATE, GRADIENT_NORM = "loss.png", "learning_rate.png", "gradient_norm.png"
LENGTHS, MARGINS = "row_lengths.png", "reward_margins.png"

ANSWERS_TABLE = "sample_answers.json"
ANSWER_COLUMNS = ("row", "question", "expected", "answer")
MAX_NEW_TOKENS = 64
"""Longest answer, in tokens: each job answers, also where nobody looks."""


class Figures(pl.Callback):
    """Draws what was trained on and how it went, at the end of a fit, also of one that fails.

    A picture that cannot be drawn is a warning: what was trained counts.
    """

    def __init__(self, record: JobRecord, work_dir: Path, data: FineTuningData) -> None:
        self._record = record
        self._folder = work_dir / FIGURES
        self._data = data

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, in the process that keeps the record."""
        if trainer.is_global_zero:
            self._draw(cast(PostTraining, pl_module))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Draw what there is, for who asks why it failed; who is to stop has no time for it."""
        if isinstance(exception, Exception) and not isinstance(exception, StopRequestedError):
            self.on_fit_end(trainer, pl_module)

    def _draw(self, module: PostTraining) -> None:
        drawn: dict[str, Callable[[], Figure | None]] = {
            LOSS: self._loss,
            LEARNING_RATE: lambda: self._curve("Learning rate", "rate", names.METRIC_LEARNING_RATE),
            GRADIENT_NORM: lambda: self._curve(
                "Norm of the gradient before each update", "2-norm", names.METRIC_GRADIENT_NORM
            ),
            LENGTHS: self._lengths,
            MARGINS: lambda: margins_figure(module.distributions),
        }
        for name, draw in drawn.items():
            file = self._folder / name
            try:
                if (figure := draw()) is not None:
                    save(figure, file)
                    self._record.log_figure(file)
            except Exception as error:  # whatever ails a library or the disk
                log.warning("the picture %s cannot be drawn: %s", name, error)

    def _loss(self) -> Figure | None:
        metrics = {"training": names.METRIC_TRAIN_LOSS, "validation": names.METRIC_VALIDATION_LOSS}
        curves = {name: self._record.history(metric) for name, metric in metrics.items()}
        return curves_figure("Loss", "loss", curves)

    def _curve(self, title: str, unit: str, metric: str) -> Figure | None:
        return curves_figure(title, unit, {metric: self._record.history(metric)})

    def _lengths(self) -> Figure | None:
        lengths = {name: list(shards.known_lengths()) for name, shards in self._data.data_sets.items()}
        shown = {f"{name} ({len(found)} rows)": found for name, found in lengths.items()}
        longest = self._data.max_row_length
        return distributions_figure(
            "Length of the rows", "tokens", "rows", shown, (f"cut at {longest}", longest)
        )


def margins_figure(distributions: Mapping[str, Tensor]) -> Figure | None:
    """Draw the margins between the rewards of chosen and rejected answers, in nats; None but for DPO.

    :param distributions: a value a pair (n), by metric.
    """
    metrics = {"training, last epoch": "", "validation": names.VALIDATION_PREFIX}
    found = {
        name: distributions.get(f"{prefix}{names.METRIC_REWARD_MARGIN}") for name, prefix in metrics.items()
    }
    shown = {
        f"{name} ({float((margins > 0).float().mean()):.0%} above 0)": margins.tolist()
        for name, margins in found.items()
        if margins is not None and len(margins)
    }
    title = "Reward margins: chosen − rejected"
    return distributions_figure(title, "nats", "pairs", shown, ("no preference", 0.0))


class SampleAnswers(pl.Callback):
    """Lets the trained model answer a few rows of its data, beside the answers that they hold.

    A model that cannot answer is a warning: what was trained counts.

    :param questions: by their row's number.
    """

    def __init__(
        self, questions: Mapping[int, Question], tokenizer: PreTrainedTokenizerBase, record: JobRecord
    ) -> None:
        self._questions = questions
        self._tokenizer = tokenizer
        self._record = record

    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer, in the process that keeps the record, and log the table.

        A model whose weights are divided does not: if one process failed, the others would wait for it.

        :raises StopRequestedError: if the process is to stop.
        """
        module = cast(PostTraining, pl_module)
        if not self._questions or isinstance(trainer.strategy, ModelParallelStrategy):
            return
        module.stop_if_asked()
        if trainer.is_global_zero:
            try:
                self._answer(trainer, module)
            except Exception as error:  # a device that has no memory for it
                log.warning("the sample questions cannot be answered: %s", error)

    def _answer(self, trainer: pl.Trainer, module: PostTraining) -> None:
        module.to(trainer.strategy.root_device).eval()  # Lightning has moved it to the CPU
        with trainer.precision_plugin.val_step_context():  # of the weights' types, as in validation
            given = answers_of(
                module.language_model,
                self._tokenizer,
                self._questions,
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=len(self._questions),
            )
        rows = [
            [number, question.text, question.expected, given[number]]
            for number, question in self._questions.items()
        ]
        self._record.log_table(ANSWERS_TABLE, ANSWER_COLUMNS, rows)
