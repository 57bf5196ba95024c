"""What a checkpoint's folder says of itself, to people and to MLflow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft.utils import CONFIG_NAME
from transformers import PreTrainedTokenizerBase

from lightning_modules.model_card import CARD_FILE, MODEL_FILE, Facts, card_text, model_card
from post_training.schemas.jobs import PostTrainingMetric
from post_training.schemas.record import TAG_DESCRIPTION

if TYPE_CHECKING:
    from lightning_modules.record import JobRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """Writes a model card into a checkpoint's folder and, where the job has an MLflow run, MLflow's flavor.

    The newest card describes the run too.

    :param architecture: class of the model in transformers.
    """

    facts: Facts
    architecture: str
    tokenizer: PreTrainedTokenizerBase
    record: JobRecord

    def __call__(self, folder: Path, metrics: PostTrainingMetric) -> None:
        """Describe the weights that lie in the folder."""
        is_adapter = (folder / CONFIG_NAME).is_file()
        (folder / CARD_FILE).write_text(model_card(self.facts, metrics, is_adapter=is_adapter))
        self.record.set_tag(TAG_DESCRIPTION, card_text(self.facts, metrics, is_adapter=is_adapter))
        if self.facts.run_id is not None:
            try:
                self._write_flavor(folder, self.facts.run_id)
            except Exception as error:  # another MLflow's, or of a library that is missing
                (folder / MODEL_FILE).unlink(missing_ok=True)
                log.warning("MLflow's loader will not know the checkpoint: %s", error)

    def _write_flavor(self, folder: Path, run_id: str) -> None:
        from lightning_modules.flavor import write_flavor  # noqa: PLC0415 - mlflow: a second of imports

        write_flavor(
            folder,
            base=self.facts.base_source,
            architecture=self.architecture,
            tokenizer=self.tokenizer,
            run_id=run_id,
        )
