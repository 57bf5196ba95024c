"""The fast path against transformers and peft, a sequence in each row: the same losses and gradients.

In fp32, at each of a few optimizer steps, at the lengths where an off-by-one would show: odd ones, answers
of one token, prompts of one token (a sequence's first is never scored), as many as the model has positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lightning_modules.adapters import add_adapters
from lightning_modules.data.batches import Arrangement, collate
from lightning_modules.data.tokenize import Example, Pair
from lightning_modules.engine.lora import use_fast_adapters
from lightning_modules.engine.prepare import speed_up
from lightning_modules.objective import Objective
from lightning_modules.preference import PreferenceOptimization
from lightning_modules.quantization import prepare
from lightning_modules.supervised import SupervisedFineTuning
from post_training.schemas.algorithms import DPOAlignmentConfig, LoraFinetuningConfig, QATFinetuningConfig
from tests.lightning_modules.tiny import LORA, TINY

POSITIONS, STEPS, BETA = 256, 3, 0.5
ALL = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
LENGTHS = [(1, 2), (7, 1), (30, 13), (31, 200), (1, POSITIONS - 1), (POSITIONS - 1, 1), (17, 129)]
"""Tokens of prompt and answer; prompts longer than 20 share their first 20."""


@dataclass(frozen=True)
class Algorithm:
    """How the weights are trained."""

    adapter: dict[str, Any] | None = None
    quantized: bool = False

    def prepare(self, model: Any) -> Any:
        """Make the model ready, as a job does."""
        if self.quantized:
            prepare(model, QATFinetuningConfig(quantizer_name="int4_weight_only", group_size=16))
            return model
        if self.adapter is None:
            return model
        adapted = add_adapters(model, LoraFinetuningConfig.model_validate(LORA | self.adapter), "base")
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return adapted


ALGORITHMS = {
    "lora": Algorithm({}),
    "lora-all": Algorithm(ALL),
    "dora": Algorithm(ALL | {"use_dora": True}),
    "qat": Algorithm(quantized=True),
    "full": Algorithm(),
}
KINDS = ("llama", "qwen2", "mistral", "gemma", "gemma2", "gpt2")
CASES = [(kind, name) for kind in KINDS for name in ALGORITHMS if (kind, name) != ("gpt2", "qat")]
"""GPT-2's projections are no nn.Linear: QAT refuses it."""


def sequence(prompt: list[int], answer: list[int]) -> Example:
    return Example(prompt + answer, [-100] * len(prompt) + answer)


def tokens(count: int, rng: torch.Generator) -> list[int]:
    return list(torch.randint(3, 400, (count,), generator=rng).tolist())


def prompts() -> Iterator[tuple[list[int], int, torch.Generator]]:
    rng = torch.Generator().manual_seed(1)
    stem = tokens(20, rng)
    for length, answer in LENGTHS:
        shared = stem if length > len(stem) else []
        yield shared + tokens(length - len(shared), rng), answer, rng


def base(kind: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(TINY[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()  # type: ignore[no-untyped-call]


def models(kind: str, algorithm: Algorithm) -> tuple[Any, Any]:
    """The plain model, and ours."""
    ours = base(kind)
    assert speed_up(ours, "sdpa", POSITIONS)
    ours = algorithm.prepare(ours)
    use_fast_adapters(ours)
    return algorithm.prepare(base(kind)), ours


def log_probs(model: Any, example: Example) -> Tensor:
    """Of the scored tokens, through the whole model."""
    logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0].float()
    labels = torch.tensor(example.labels)[1:]
    return -functional.cross_entropy(logits[:-1], labels, reduction="none")[labels != -100]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_steps(
    plain: Any, ours: Any, plain_loss: Any, objective: Objective, batch: dict[str, Any], *, same: bool = False
) -> None:
    """Compare losses and gradients at each of a few steps of AdamW, which both models take.

    :param same: give both the same weights after each step.
    """
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (plain, ours)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3) for parameters in trained]
    for _ in range(STEPS):
        losses = [plain_loss(), objective(ours, batch).loss / batch["units"]]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-5)
        expected, found = gradients(plain), gradients(ours)
        assert expected.keys() == found.keys()
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if same:
            ours.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_supervised_fine_tuning(kind: str, name: str) -> None:
    plain, ours = models(kind, ALGORITHMS[name])
    examples = [sequence(prompt, tokens(count, rng)) for prompt, count, rng in prompts()]

    def plain_loss() -> Tensor:
        return -torch.cat([log_probs(plain, example) for example in examples]).mean()

    batch = collate([[example] for example in examples], 0, Arrangement.TREE)
    # A weight that differs in its last bit may be quantized to another level.
    quantized = ALGORITHMS[name].quantized
    check_steps(plain, ours, plain_loss, SupervisedFineTuning(), batch, same=quantized)


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_preference_optimization(kind: str, name: str) -> None:
    plain, ours = models(kind, ALGORITHMS[name])
    pairs = []
    for prompt, count, rng in prompts():
        answers = [tokens(count, rng), tokens(max(1, count - 3), rng)]
        pairs.append(Pair(*(sequence(prompt, answer) for answer in answers)))

    def ratio(example: Example) -> Tensor:
        with torch.no_grad(), plain.disable_adapter():
            reference = log_probs(plain, example)
        return (log_probs(plain, example) - reference).sum()

    def plain_loss() -> Tensor:
        margins = [BETA * (ratio(pair.chosen) - ratio(pair.rejected)) for pair in pairs]
        return -functional.logsigmoid(torch.stack(margins)).mean()

    batch = collate([[pair] for pair in pairs], 0, Arrangement.TREE)
    objective = PreferenceOptimization(DPOAlignmentConfig(beta=BETA, epsilon=0.0))
    check_steps(plain, ours, plain_loss, objective, batch)
