"""Keeps out of a trainer what its libraries would import and its job does not use.

That would take three seconds of each start and 250 MiB of each trainer.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import ModuleType

from post_training.schemas.algorithms import QATFinetuningConfig
from post_training.schemas.trainer import TrainerSpec

OPTIONAL = ("bitsandbytes", "scipy", "torchao")
"""What peft and transformers import where they find it, by what of ours is quantized: for 4-bit bases and
losses of object detection the first two, for QAT and bases whose 4 bits bitsandbytes cannot hold the last.
"""


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
    if adapters is not None and adapters.quantize_base:
        return
    unused = set(OPTIONAL)
    if isinstance(spec.request.algorithm_config, QATFinetuningConfig):
        unused.remove("torchao")
    sys.modules |= dict.fromkeys(unused)  # type: ignore[arg-type]  # how Python spells "not there"


def _without_metrics() -> ModuleType:
    module = ModuleType(
        "torchmetrics", "Stands in for the library in a process that measures nothing with it."
    )
    module.__version__ = version("torchmetrics")  # type: ignore[attr-defined]
    for name in ("Metric", "MetricCollection"):
        setattr(module, name, type(name, (), {}))
    return module
