"""Adapters of the tiny model, written and found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.adapters import add_adapters
from lightning_modules.base_model import Base, find_base
from lightning_modules.models import load_model
from post_training.schemas.algorithms import LoraFinetuningConfig
from post_training.schemas.trainer import TrackingTarget
from tests.lightning_modules.tiny import LORA

IDS = torch.arange(12)[None]


def load(source: str | Path) -> Any:
    """Load a model in fp32."""
    return load_model(str(source), dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Compute the logits of twelve tokens, without dropout."""
    answer: Tensor = model.eval()(input_ids=IDS).logits
    return answer


def lora(**changes: Any) -> LoraFinetuningConfig:
    """Return the configuration of the tests' adapters, changed."""
    return LoraFinetuningConfig.model_validate(LORA | changes)


def adapt(model: Any, base: str, seed: int, **changes: Any) -> Any:
    """Add adapters with weights that change the model."""
    adapted = add_adapters(model, lora(**changes), base)
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def write_adapter(folder: Path, model: Path, *, seed: int = 1, **changes: Any) -> Path:
    """Write an adapter of a model; keywords change its configuration."""
    adapt(load(model), str(model), seed).save_pretrained(str(folder), save_embedding_layers=False)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def find(model: str | Path, tmp_path: Path, *roots: Path, tracking: TrackingTarget | None = None) -> Base:
    """Find a base, downloads going below the test's folder."""
    return find_base(str(model), tmp_path / "base", tracking, roots)
