"""Dropout rates of a model."""

from __future__ import annotations

from torch import nn


def has_dropout(model: nn.Module) -> bool:
    """Whether training draws noise, so that equal beginnings would not be computed alike."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or bool(_of_attention(module))
        for module in model.modules()
    )


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: its noise would look like a distance between policy and reference."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if _of_attention(module) is not None:
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - to mypy it could be a module


def _of_attention(module: nn.Module) -> float | None:
    rate = getattr(module, "attention_dropout", None)
    return rate if isinstance(rate, float) else None
