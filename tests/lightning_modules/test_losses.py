"""The loss by hand, and in chunks."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_modules import losses
from lightning_modules.losses import chunk_rows, perplexity, scale_logits, scored_hidden, token_loss_sum


def test_scored_hidden_predicts_the_next_token() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]])
    selected, targets = scored_hidden(hidden, labels)
    assert selected.flatten().tolist() == [1.0, 2.0, 4.0]
    assert targets.tolist() == [7, 8, 9]


def test_token_loss_sum_by_hand() -> None:
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [1.0]])
    loss = token_loss_sum(torch.tensor([[0.0], [math.log(3)]]), torch.tensor([0, 1]), head, config())
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3))


def config(**changes: Any) -> Any:
    return SimpleNamespace(**({"vocab_size": 11} | changes))


SCALINGS = [{}, {"logit_scale": 0.3}, {"logits_scaling": 4.0}, {"final_logit_softcapping": 1.5}]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_neither_loss_nor_gradients(
    scaling: dict[str, float], trained_head: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk * 11)
    torch.manual_seed(0)
    head = nn.Linear(5, 11).requires_grad_(trained_head)
    hidden, targets = torch.randn(7, 5, requires_grad=True), torch.randint(11, (7,))
    logits = scale_logits(head(hidden), config(**scaling))
    plain = functional.cross_entropy(logits, targets, reduction="sum")
    leaves = [hidden, *(p for p in head.parameters() if trained_head)]
    expected = torch.autograd.grad(plain * 3, leaves)
    loss = token_loss_sum(hidden, targets, head, config(**scaling))
    assert loss.item() == pytest.approx(plain.item())
    for got, want in zip(torch.autograd.grad(loss * 3, leaves), expected, strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert token_loss_sum(hidden, targets, head, config(**scaling)).item() == pytest.approx(plain.item())


def test_a_chunk_has_as_many_rows_as_its_logits_allow() -> None:
    assert chunk_rows(config(vocab_size=49152)) == 682  # 2^25 / 49152 = 682.67
    assert chunk_rows(config(vocab_size=2**26)) == 1


def test_scalings_by_hand() -> None:
    logits = torch.tensor([[2.0, -4.0]])
    assert scale_logits(logits, config(logit_scale=0.5)).tolist() == [[1.0, -2.0]]
    assert scale_logits(logits, config(logits_scaling=2.0)).tolist() == [[1.0, -2.0]]
    capped = scale_logits(logits, config(final_logit_softcapping=2.0)).tolist()[0]
    assert capped == pytest.approx([2 * math.tanh(1), 2 * math.tanh(-2)])


def test_perplexity_stays_finite() -> None:
    assert perplexity(1.0) == pytest.approx(math.e)
    assert math.isfinite(perplexity(1e9))
