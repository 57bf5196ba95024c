"""Compiled layers compute what they computed before."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo

from lightning_modules.data.batches import Arrangement, collate
from lightning_modules.engine.compiling import LONG_JOB, compile_layers, is_long
from lightning_modules.engine.lora import use_fast_adapters
from lightning_modules.engine.prepare import speed_up
from lightning_modules.objective import language_model
from lightning_modules.supervised import SupervisedFineTuning
from tests.lightning_modules.test_same_numbers import ALGORITHMS, base, gradients, prompts, sequence, tokens

COMPILER_WARNINGS = "ignore"
"""The compiler looks into every module that is loaded, Airflow's deprecated ones too."""


def adapted() -> Any:
    model = base("llama")
    assert speed_up(model, "sdpa", 256)
    model = ALGORITHMS["lora"].prepare(model)
    use_fast_adapters(model)
    return model.train()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings(COMPILER_WARNINGS)
def test_losses_and_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [sequence(prompt, tokens(count, rng)) for prompt, count, rng in prompts()]
    batches = [collate([[e] for e in part], 0, Arrangement.TREE) for part in (examples, examples[2:5])]
    results = []
    for compiled in (False, True):
        model = adapted()
        if compiled:
            assert compile_layers(language_model(model))
            monkeypatch.setattr(dynamo.config, "suppress_errors", False)  # nothing runs as it is written
        losses = [SupervisedFineTuning()(model, batch).loss for batch in batches]
        torch.stack(losses).sum().backward()
        results.append((torch.stack(losses).detach(), gradients(model)))
    (plain, expected), (found, compiled_gradients) = results
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compile_layers(language_model(adapted()))


def test_a_job_is_long_by_its_tokens_and_parameters() -> None:
    parameters = 135_000_000
    assert not is_long(int(LONG_JOB / parameters) - 1, parameters)
    assert is_long(int(LONG_JOB / parameters) + 1, parameters)
