"""What makes a checkpoint's folder a model of MLflow's: its flavor ``transformers``, beside what peft reads.

``mlflow.transformers.load_model`` and ``mlflow models serve`` read it; every other library passes it over.

Reference: https://mlflow.org/docs/latest/ml/model/#storage-format
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from mlflow.models import Model, ModelSignature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from peft.utils import CONFIG_NAME
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME as CONFIG_FILE

from lightning_modules.model_card import MODEL_FILE

REQUIREMENTS_FILE, ENVIRONMENT_FILE = "requirements.txt", "python_env.yaml"
COMPONENTS = "components"
"""Where MLflow looks for the tokenizer; others look for it beside the weights."""

CHAT = "llm/v1/chat"
"""MLflow's name for models that take messages, in OpenAI's form, and apply the chat template to them."""

LIBRARIES = ("torch", "transformers", "accelerate")
"""What every model is loaded with, beside mlflow."""


def write_flavor(
    folder: Path, *, base: str, architecture: str, tokenizer: PreTrainedTokenizerBase, run_id: str
) -> None:
    """Describe a checkpoint to MLflow.

    A whole model lies in the folder itself. An adapter's base stays where it is, and is loaded from there
    unless the caller of ``load_model`` gives another ``base_model_path``.

    :param folder: holds the weights.
    :param base: where transformers finds an adapter's base: a folder, or a hub id.
    :param architecture: class of the model in transformers.
    :param run_id: MLflow's id of the job's run.
    """
    is_adapter = (folder / CONFIG_NAME).is_file()
    described = {"local_base_model_path": base, "peft_adaptor": "."} if is_adapter else {"model_binary": "."}
    model = Model(
        run_id=run_id,
        signature=ModelSignature(inputs=CHAT_MODEL_INPUT_SCHEMA, outputs=CHAT_MODEL_OUTPUT_SCHEMA),
        metadata={"task": CHAT},
    )
    model.add_flavor(
        "transformers",
        transformers_version=version("transformers"),
        task="text-generation",
        inference_task=CHAT,
        instance_type="TextGenerationPipeline",
        pipeline_model_type=architecture,
        source_model_name=base,
        components=["tokenizer"],
        tokenizer_type="AutoTokenizer",
        **described,
    )
    model.add_flavor(
        "python_function",
        loader_module="mlflow.transformers",
        python_version=platform.python_version(),
        env={"virtualenv": ENVIRONMENT_FILE},
    )
    model.save(str(folder / MODEL_FILE))
    tokenizer.save_pretrained(folder / COMPONENTS / "tokenizer")
    _write_requirements(folder, _libraries(folder, is_adapter=is_adapter))


def _libraries(folder: Path, *, is_adapter: bool) -> list[str]:
    if is_adapter:
        return [*LIBRARIES, "peft"]
    quantized = "quantization_config" in json.loads((folder / CONFIG_FILE).read_bytes())
    return [*LIBRARIES, "torchao"] if quantized else [*LIBRARIES]


def _write_requirements(folder: Path, libraries: list[str]) -> None:
    mlflow = f"mlflow=={version('mlflow-skinny')}"  # the part of it that the trainer has
    lines = [mlflow, *(f"{name}=={version(name)}" for name in libraries)]
    (folder / REQUIREMENTS_FILE).write_text("\n".join(lines) + "\n")
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": [f"-r {REQUIREMENTS_FILE}"],
    }
    (folder / ENVIRONMENT_FILE).write_text(yaml.safe_dump(environment))
