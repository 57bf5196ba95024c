"""Token log-probabilities against the softmax of all logits, and what they hold in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules import logprobs
from lightning_modules.logprobs import chunk_rows, scale_logits, token_log_probs

WIDTH, VOCABULARY, TOKENS = 5, 11, 7
ALL_SCALINGS = {"logit_scale": 0.7, "final_logit_softcapping": 1.5}


def config(**changes: Any) -> Any:
    return SimpleNamespace(**({"vocab_size": VOCABULARY} | changes))


def reference(hidden: Tensor, targets: Tensor, head: nn.Module, config: Any) -> Tensor:
    logits = scale_logits(head(hidden), config).float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def check_gradients(ours: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected)
    upstream = torch.linspace(-1, 2, len(ours))
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for got, want in zip(torch.autograd.grad(ours, leaves, upstream), wanted, strict=True):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want)


@pytest.fixture(autouse=True)
def chunk_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how many rows a chunk has, 3 until a test says otherwise; a block has 2."""
    torch.manual_seed(0)

    def set_rows(rows: int) -> None:
        monkeypatch.setattr(logprobs, "CHUNK_LOGITS", rows * VOCABULARY)
        monkeypatch.setattr(logprobs, "MIN_ROWS", 1)
        monkeypatch.setattr(logprobs, "BLOCK_LOGITS", 2 * VOCABULARY)

    set_rows(3)
    return set_rows


def test_a_chunk_has_as_many_rows_as_its_logits_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert chunk_rows(config(vocab_size=49152)) == 341  # 2^24 / 49152 = 341.33
    assert chunk_rows(config(vocab_size=2**26)) == logprobs.MIN_ROWS


def test_scalings_by_hand() -> None:
    logits = torch.tensor([[2.0, -4.0]])
    assert scale_logits(logits, config(logit_scale=0.5)).tolist() == [[1.0, -2.0]]
    assert scale_logits(logits, config(logits_scaling=2.0)).tolist() == [[1.0, -2.0]]
    capped = scale_logits(logits, config(final_logit_softcapping=2.0)).tolist()[0]
    assert capped == pytest.approx([2 * math.tanh(1), 2 * math.tanh(-2)])


def test_by_hand() -> None:
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [1.0]])
    hidden = torch.tensor([[0.0], [math.log(3)]])
    found = token_log_probs(hidden, torch.tensor([0, 1]), head, config(vocab_size=2))
    assert found.tolist() == pytest.approx([math.log(1 / 2), math.log(3 / 4)])


@pytest.mark.parametrize(
    "scaling",
    [{}, {"logit_scale": 0.3}, {"logits_scaling": 4.0}, {"final_logit_softcapping": 0.5}, ALL_SCALINGS],
)
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("rows", [1, 3, TOKENS, 64])
def test_chunks_change_neither_values_nor_gradients(
    scaling: dict[str, float],
    trained_head: bool,
    rows: int,
    chunk_of: Callable[[int], None],
) -> None:
    chunk_of(rows)
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(trained_head)
    hidden, targets = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (TOKENS,))
    expected = reference(hidden, targets, head, config(**scaling))
    found = token_log_probs(hidden, targets, head, config(**scaling))
    check_gradients(found, expected, [hidden, *(p for p in head.parameters() if trained_head)])
    with torch.no_grad():
        assert torch.equal(token_log_probs(hidden, targets, head, config(**scaling)), found)


def test_a_tied_head_adds_to_the_embedding_s_gradient() -> None:
    embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight = embedding.weight
    ids, targets = torch.randint(VOCABULARY, (2, TOKENS))
    expected = reference(embedding(ids).tanh(), targets, head, config())
    found = token_log_probs(embedding(ids).tanh(), targets, head, config())
    check_gradients(found, expected, [embedding.weight])


def test_an_adapter_on_the_head_is_trained() -> None:
    model = nn.ModuleDict({"head": nn.Linear(WIDTH, VOCABULARY, bias=False)})
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["head"], lora_dropout=0.0, init_lora_weights=False), model
    )
    hidden, targets = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randint(VOCABULARY, (TOKENS,))
    adapter = [p for p in model.parameters() if p.requires_grad]
    assert len(adapter) == 2
    expected = reference(hidden, targets, model["head"], config())
    found = token_log_probs(hidden, targets, model["head"], config())
    check_gradients(found, expected, [hidden, *adapter])


def test_a_bf16_head_does_not_round_its_logits(chunk_of: Callable[[int], None]) -> None:
    chunk_of(64)
    head = nn.Linear(WIDTH, VOCABULARY).bfloat16()
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    exact_head = nn.Linear(WIDTH, VOCABULARY)
    exact_head.load_state_dict(head.state_dict())
    exact = reference(hidden.float(), targets, exact_head, config())
    assert (reference(hidden, targets, head, config()) - exact).abs().max() > 1e-3
    fine = token_log_probs(hidden, targets, head, config())
    torch.testing.assert_close(fine, exact)
    of_exact, wanted = torch.autograd.grad(exact.sum(), [hidden, exact_head.weight])
    of_fine, found = torch.autograd.grad(fine.sum(), [hidden, head.weight])
    assert found.dtype == of_fine.dtype == torch.bfloat16
    torch.testing.assert_close(of_fine, of_exact, rtol=0.016, atol=1e-3)  # its products are bf16's
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16-weight", "autocast"])
def test_precise_log_probabilities_lose_most_of_the_noise(autocast: bool) -> None:
    """Logits up to 30, as a trained model has them, and a few tokens that have most of the probability."""
    width, vocabulary, tokens = 64, 4000, 200
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    head.weight.data.normal_()
    if not autocast:
        head = head.bfloat16()
    hidden = torch.randn(tokens, width)
    targets = torch.randint(vocabulary, (tokens,))
    targets[::2] = (hidden[::2] @ head.weight.float().T).argmax(-1)
    exact = (hidden @ head.weight.float().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = token_log_probs(hidden, targets, head, config(vocab_size=vocabulary))
        rounded = head(hidden.to(head.weight.dtype)).float().log_softmax(-1).gather(1, targets[:, None])

    def noise(values: Tensor) -> float:
        return float((values - exact).square().mean().sqrt())

    assert noise(found) < noise(rounded.squeeze(1)) / 8


def test_autocast_does_not_reach_the_head() -> None:
    head, hidden = nn.Linear(WIDTH, VOCABULARY), torch.randn(TOKENS, WIDTH)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    exact = reference(hidden, targets, head, config())
    with torch.autocast("cpu", torch.bfloat16):
        coarse = reference(hidden, targets, head, config())
        fine = token_log_probs(hidden, targets, head, config())
    assert fine.dtype == torch.float32
    assert (coarse - exact).abs().max() > 1e-3
    torch.testing.assert_close(fine, exact)


def test_under_autocast_the_head_s_gradient_is_summed_in_fp32(chunk_of: Callable[[int], None]) -> None:
    tokens = 256
    head, hidden = nn.Linear(WIDTH, VOCABULARY, bias=False), torch.randn(tokens, WIDTH)
    targets = torch.randint(VOCABULARY, (tokens,))
    (exact,) = torch.autograd.grad(reference(hidden, targets, head, config()).sum(), [head.weight])

    def error(rows: int) -> float:
        chunk_of(rows)
        with torch.autocast("cpu", torch.bfloat16):
            found = token_log_probs(hidden, targets, head, config())
        (gradient,) = torch.autograd.grad(found.sum(), [head.weight])
        return float((gradient - exact).norm() / exact.norm())

    # Products of bf16 are off by a thousandth; summed in bf16, 256 chunks would be off by a hundredth.
    assert max(error(1), error(tokens)) < 4e-3


def test_no_token_has_no_log_probability_and_no_gradient() -> None:
    head, hidden = nn.Linear(WIDTH, VOCABULARY), torch.randn(0, WIDTH, requires_grad=True)
    found = token_log_probs(hidden, torch.empty(0, dtype=torch.long), head, config())
    assert found.shape == (0,)
    assert found.dtype == torch.float32
    of_hidden, of_head = torch.autograd.grad(found.sum(), [hidden, head.weight])
    assert of_hidden.shape == (0, WIDTH)
    assert not of_head.any()


class Sizes(TorchDispatchMode):
    """Note the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        self.found += [part.numel() for part in _flat(answer) if isinstance(part, Tensor)]
        return answer


def _flat(answer: Any) -> Any:
    return answer if isinstance(answer, tuple | list) else [answer]


def test_neither_pass_holds_more_logits_than_a_chunk_s(chunk_of: Callable[[int], None]) -> None:
    tokens, rows = 60, 6
    chunk_of(rows)
    head, hidden = nn.Linear(1, VOCABULARY), torch.randn(tokens, 1, requires_grad=True)
    targets = torch.randint(VOCABULARY, (tokens,))
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Sizes() as sizes:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = token_log_probs(hidden, targets, head, config())
        forward = max(sizes.found)
        sizes.found.clear()
        found.sum().backward()
    assert forward == max(sizes.found) == rows * VOCABULARY
    assert sum(saved) < tokens * VOCABULARY / 2
