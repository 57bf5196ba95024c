"""Does an architecture compute what the training step takes for granted? Asked on a few tokens, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.data.layout import Segment
from lightning_modules.engine.attention import TREE
from lightning_modules.engine.tiles import Layout
from lightning_modules.logprobs import scale_logits
from post_training.errors import ModelError

STEM, BRANCH = 4, 4
"""Tokens that the two sequences of a probe share, and tokens that each has of its own."""

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05
"""Relative: bf16 kernels differ by two hundredths in the last layer, a wrong computation by tenths."""

STRIDE = 7919
"""Ids lie so far apart, modulo the vocabulary: the first ones are often special tokens, whose states bf16
blurs beyond recognition (SmolLM2-135M: by a half)."""


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Run the model without its head.

    No mask is given: padding stands behind the real tokens, and packed sequences are told apart by
    their positions, which transformers does only without a mask and a cache, or by the layout.

    :param input_ids: (b, s).
    :param position_ids: (b, s), from 0 in each sequence; None counts through the row.
    :param layout: of the one row, for :func:`lightning_modules.engine.attention.attend`.
    :returns: last hidden states (b, s, h).
    """
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    layouts = {} if layout is None else {"layout": layout}
    answer: Tensor = decoder(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **layouts
    )[0]
    return answer


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Compare the head on the decoder's states with the model's own logits.

    :raises ModelError: if they differ: the architecture scales its logits in a way of its own.
    """
    ids = torch.stack(_sequences(model))
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    with _eager(model):
        ours = scale_logits(head(hidden_states(model, ids)), model.config.get_text_config())
        theirs = model(input_ids=ids, use_cache=False).logits
    if not close(model, ours, theirs):
        raise ModelError(
            f"models of type {model.config.model_type} cannot be trained: their output head is not known"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare two sequences in one row with each in a row of its own.

    :raises ModelError: if they see each other.
    """
    ids = torch.cat(_sequences(model))[None]
    positions = torch.arange(STEM + BRANCH).repeat(2)[None]
    if not close(model, hidden_states(model, ids, positions).flatten(0, 1), alone(model)):
        raise ModelError(
            f"packed is not possible with models of type {model.config.model_type}: their sequences would see"
            " each other"
        )


@torch.no_grad()
def alone(model: PreTrainedModel) -> Tensor:
    """Return the hidden states of two sequences, each in a row of its own: (2 · (STEM + BRANCH), h)."""
    with _eager(model):
        return torch.cat([hidden_states(model, ids[None])[0] for ids in _sequences(model)])


@torch.no_grad()
def as_tree(model: PreTrainedModel) -> tuple[Tensor, set[int | None]]:
    """Return the same of both in one row where they share their beginning, and the windows of the layers."""
    first, second = _sequences(model)
    ids, positions = torch.cat([first, second[STEM:]]), torch.arange(STEM + BRANCH)
    stem, end = (0, STEM), STEM + BRANCH
    branches = [Segment((start, start + BRANCH), (stem,)) for start in (STEM, end)]
    layout = Layout([Segment(stem), *branches])
    positions = torch.cat([positions, positions[STEM:]])
    states = hidden_states(model, ids[None], positions[None], layout)[0]
    return torch.cat([states[:end], states[:STEM], states[end:]]), layout.windows


def close(model: PreTrainedModel, ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results of a model differ by rounding only."""
    tolerance = TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
    difference = (ours.float() - theirs.float()).norm()
    return bool(difference <= tolerance * theirs.float().norm())


def _sequences(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + STEM + 2 * BRANCH) * STRIDE % vocabulary
    stem, first, second = torch.split(ids, [STEM, BRANCH, BRANCH])
    return torch.cat([stem, first]), torch.cat([stem, second])


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute attention as it is written, which knows all that the architecture does."""
    attention = model.config.get_text_config()._attn_implementation
    if attention == TREE:
        yield  # it was found to compute the same
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
