"""Does an architecture compute what the training step takes for granted? Asked on a few tokens, once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.attention import BY_SEQUENCE, Layout
from lightning_modules.losses import scale_logits
from post_training.errors import ModelError

PROBE_TOKENS = 12
TOLERANCE = 0.05
"""Relative; bf16 kernels differ by a few thousandths, a wrong computation by tenths."""


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    """Run the model without its head.

    No mask is given: padding stands behind the real tokens, and packed sequences are told apart by
    their positions, which transformers does only without a mask and a cache.

    :param input_ids: (b, s).
    :param position_ids: (b, s), from 0 in each sequence; None counts through the row.
    :param layout: the rows' sequences, for :func:`lightning_modules.attention.attend_by_sequence`;
        other attention functions ignore it.
    :returns: last hidden states (b, s, h).
    """
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    packing = {"layout": layout} if model.config.get_text_config()._attn_implementation == BY_SEQUENCE else {}
    answer: Tensor = decoder(
        input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False, **packing
    )[0]
    return answer


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Compare the head on the decoder's states with the model's own logits.

    :raises ModelError: if they differ: the architecture scales its logits in a way of its own.
    """
    ids = torch.arange(PROBE_TOKENS)[None]
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    ours = scale_logits(head(hidden_states(model, ids)), model.config.get_text_config())
    if not _close(ours, model(input_ids=ids, use_cache=False).logits):
        raise ModelError(
            f"models of type {model.config.model_type} cannot be trained: their output head is not known"
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare two sequences in one row with each in a row of its own.

    :raises ModelError: if they see each other.
    """
    ids = torch.arange(PROBE_TOKENS)[None]
    middle = PROBE_TOKENS // 2
    positions = torch.arange(PROBE_TOKENS)[None] % middle
    packed = hidden_states(model, ids, positions, [[middle, middle]])
    alone = torch.cat([hidden_states(model, ids[:, :middle]), hidden_states(model, ids[:, middle:])], dim=1)
    if not _close(packed, alone):
        raise ModelError(
            f"packed is not possible with models of type {model.config.model_type}: their sequences would see"
            " each other"
        )


def _close(ours: Tensor, theirs: Tensor) -> bool:
    difference = (ours.float() - theirs.float()).norm()
    return bool(difference <= TOLERANCE * theirs.float().norm())
