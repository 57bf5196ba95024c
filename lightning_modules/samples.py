"""What the model answers while it is trained: a table of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning.pytorch as pl
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.data.messages import Message
from lightning_modules.generation import answers, max_positions, prompt_ids
from post_training.errors import InvalidRequestError

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

MAX_NEW_TOKENS = 128
"""Longest answer, in tokens."""

SAMPLES_TABLE = "samples.json"
COLUMNS = ("step", "prompt", "answer")


class AnsweringModule(Protocol):
    """What the callback needs of the module that is trained."""

    optimizer_steps: int
    """Optimizer steps done, those of earlier attempts included."""

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, adapters inside."""

    def stop_if_asked(self) -> None:
        """Raise if the process is to stop."""


class SamplePrompts(pl.Callback):
    """Lets the model answer the prompts at the end of each validation.

    Nothing that training depends on changes: decoding is greedy, without gradients, and in the
    evaluation mode that Lightning leaves only after this hook.

    :param prompts: each the one user turn of a conversation.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        record: JobRecord,
    ) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._record = record
        self._rows: list[list[Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse before training what could not be answered.

        :raises InvalidRequestError: if a prompt does not fit the chat template or the model's positions.
        """
        positions = max_positions(_answering(pl_module).language_model)
        for i, prompt in enumerate(self._prompts):
            field = f"logger_config.sample_prompts.{i}"
            try:
                tokens = len(prompt_ids(self._tokenizer, [_user_turn(prompt)]))
            except Exception as error:  # a template raises what it likes
                raise InvalidRequestError.of(field, f"the chat template refuses it: {error}") from error
            if positions is not None and tokens >= positions:
                raise InvalidRequestError.of(
                    field, f"must have fewer than the model's {positions} tokens, got {tokens}"
                )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Answer, and log the table.

        :raises StopRequestedError: between two prompts, if the process is to stop.
        """
        module = _answering(pl_module)
        step = module.optimizer_steps
        rows = list(self._rows)
        with trainer.precision_plugin.val_step_context():  # of the weights' types, as in validation
            for prompt in self._prompts:
                module.stop_if_asked()
                rows.append([step, prompt, answer(module.language_model, self._tokenizer, prompt)])
        self._rows = rows
        self._record.log_table(SAMPLES_TABLE, COLUMNS, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the answers so far; Lightning saves them."""
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the answers of the attempt before."""
        self._rows = state_dict["rows"]


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Answer a prompt by greedy decoding, up to an end token.

    :param model: in evaluation mode; left as it is.
    :returns: the answer without special tokens, of at most ``MAX_NEW_TOKENS`` tokens, and of as many as
        the model has positions for.
    """
    [text] = answers(model, tokenizer, [prompt_ids(tokenizer, [_user_turn(prompt)])], MAX_NEW_TOKENS)
    return text


def _user_turn(prompt: str) -> Message:
    return {"role": "user", "content": prompt}


def _answering(module: pl.LightningModule) -> AnsweringModule:
    return cast(AnsweringModule, module)
