"""Keeps out of a trainer what its libraries would import and its job does not use.

That would take two seconds of each start and 200 MiB of each trainer.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import ModuleType

from post_training.schemas.trainer import TrainerSpec

OPTIONAL = ("bitsandbytes", "scipy")
"""What peft and transformers import where they find it: for 4-bit bases, for losses of object detection."""


def leave_out_unused(spec: TrainerSpec) -> None:
    """Hide optional libraries from those that would import them; what has imported them already has paid.

    torchmetrics is no option of Lightning's, which knows its metrics by their class alone: a stand-in has
    none, and so imports neither matplotlib nor models of text, sound and pictures. Ours are in
    :mod:`lightning_modules.means`.
    """
    if "lightning" in sys.modules or "transformers" in sys.modules:
        return
    sys.modules["torchmetrics"] = _without_metrics()
    adapters = spec.request.adapters
    if adapters is None or not adapters.quantize_base:
        sys.modules |= dict.fromkeys(OPTIONAL)  # type: ignore[arg-type]  # how Python spells "not there"


def _without_metrics() -> ModuleType:
    module = ModuleType(
        "torchmetrics", "Stands in for the library in a process that measures nothing with it."
    )
    module.__version__ = version("torchmetrics")  # type: ignore[attr-defined]
    for name in ("Metric", "MetricCollection"):
        setattr(module, name, type(name, (), {}))
    return module
