"""Architectures that compute something else than is taken for granted are found out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, MambaConfig, OlmoConfig

from lightning_modules.probes import check_logits, check_packing
from post_training.errors import ModelError
from tests.lightning_modules.tiny import TINY, UNTIED

SCALED = {
    "cohere": CohereConfig(**UNTIED, logit_scale=0.25),
    "granite": GraniteConfig(**UNTIED, logits_scaling=3.0),
}
CONFIGS = TINY | SCALED | {"olmo": OlmoConfig(**UNTIED)}
RECURRENT = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4)


def tiny(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_known_architectures_pass(kind: str) -> None:
    model = tiny(CONFIGS[kind])
    check_logits(model)
    check_packing(model)


def test_a_head_of_its_own_is_refused() -> None:
    model = tiny(TINY["llama"])
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    check_logits(model)  # a hook on the head acts in both
    forward = model.forward
    model.forward = lambda **inputs: _doubled(forward(**inputs))
    with pytest.raises(ModelError, match="models of type llama cannot be trained: their output head"):
        check_logits(model)


def _doubled(answer: Any) -> Any:
    answer.logits = answer.logits * 2
    return answer


def test_a_recurrent_model_cannot_pack() -> None:
    with pytest.raises(ModelError, match="packed is not possible with models of type mamba"):
        check_packing(tiny(RECURRENT))
