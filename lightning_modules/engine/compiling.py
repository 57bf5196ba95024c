"""Decoder layers compiled by torch.compile, where a job is long enough to win back the time it takes.

Compiled, what lies between the matrix products is one pass over memory instead of several: a tenth of a step
on two cores, for 10 to 40 seconds once. Attention stays outside: its tiles differ from step to step.
"""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_modules.engine.attention import TREE, attend

log = logging.getLogger(__name__)

LONG_JOB = 4e13
"""Tokens times parameters from which a job is compiled: ten minutes of LoRA on two cores."""


def is_long(tokens: int, parameters: int) -> bool:
    """Whether training so many tokens, over all epochs, takes much longer than to compile."""
    return tokens * parameters >= LONG_JOB


def compile_layers(model: PreTrainedModel) -> bool:
    """Compile the decoder's layers at their first step, in place; return whether the machine can.

    What the compiler cannot do is run as it is written.
    """
    if model.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        log.info("the job is long, but without a C++ compiler its layers cannot be compiled")
        return False
    from torch import _dynamo as dynamo  # noqa: PLC0415 - a second, and what follows imports more
    from torch import _inductor as inductor  # noqa: PLC0415

    settings: Any = dynamo.config
    settings.suppress_errors = True
    settings = inductor.config
    settings.compile_threads = 1  # each other one is a process that imports torch
    AttentionInterface.register(TREE, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True)
    log.info("compiling %d layers", len(layers))
    return True
