"""Switch a model over to the fast path, as far as it computes the same there."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_modules.dropout import has_dropout
from lightning_modules.engine.attention import TREE
from lightning_modules.engine.gating import gated_class
from lightning_modules.engine.norms import LayerNorm, RMSNorm, rms_norm_class
from lightning_modules.probes import alone, as_tree, close
from post_training.errors import ModelError

log = logging.getLogger(__name__)


def speed_up(model: PreTrainedModel, attention: str, max_seq_length: int, *, device: str = "cpu") -> bool:
    """Replace what is slow, in place; a replacement by which the model computes something else is undone.

    :param model: in evaluation mode, with eager attention.
    :param attention: ``eager`` to leave it so; else :mod:`lightning_modules.engine.attention` is tried, and
        where the architecture does not take it the named function of transformers is used.
    :param max_seq_length: tokens of the longest sequence.
    :param device: that trains: on a GPU ours has no dropout.
    :returns: whether rows may be laid out as trees.
    :raises ModelError: if the architecture has no such attention.
    """
    expected, kind = alone(model), model.config.model_type
    able = device == "cpu" or not has_dropout(model)
    trees = attention != "eager" and able and _takes_trees(model, expected, max_seq_length)
    if not trees:
        try:
            model.set_attn_implementation(attention)
        except ValueError as error:
            raise ModelError(f"models of type {kind} need runtime.attn_implementation eager") from error
    if not any(_replaced(model, expected, wide=wide) for wide in (True, False)):
        log.info("%s models keep their norms and feed-forward layers", kind)
    return trees


def _replaced(model: PreTrainedModel, expected: Tensor, *, wide: bool) -> bool:
    """Replace norms and gated layers; leave none replaced unless the model computes the same."""
    with ExitStack() as undo:
        for module in model.modules():
            if (fast := _fast_class(module)) is not None:
                undo.callback(setattr, module, "__class__", type(module))
                module.__class__ = fast
        if wide:
            _widen(model, undo)
        try:
            same = close(model, alone(model), expected)
        except RuntimeError:  # not every layer, and not every attention, can take what is fp32 then
            same = False
        if same:
            undo.pop_all()
        return same


def _fast_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.LayerNorm:
        return LayerNorm
    return rms_norm_class(module) or gated_class(module)


def _widen(model: PreTrainedModel, undo: ExitStack) -> None:
    """Keep the residual stream of a half precision model in fp32, as autocast does for an fp32 one.

    The last norm's result stays in fp32 too, for precise log-probabilities. And so do the angles of rotary
    embeddings, and what they turn, but for generation: transformers' attention and its caches want one type.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    for module in decoder.children():
        if isinstance(module, RMSNorm | LayerNorm):
            undo.callback(delattr, module, "in_fp32")
            module.in_fp32 = True
    if model.dtype == torch.float32:
        return
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hooks = [
        model.get_input_embeddings().register_forward_hook(_as_fp32),
        head.register_forward_pre_hook(_as_the_weight),
    ]
    narrow = partial(_as_attention_wants, model.config.get_text_config(), model.dtype)
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            hooks.append(module.register_forward_hook(narrow))
    for hook in hooks:
        undo.callback(hook.remove)


def _as_fp32(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()


def _as_attention_wants(
    config: PretrainedConfig,
    dtype: torch.dtype,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    output: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    return output if config._attn_implementation == TREE else tuple(angle.to(dtype) for angle in output)


def _as_the_weight(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = module.weight
    assert isinstance(weight, Tensor)  # noqa: S101 - of a head
    hidden, *rest = inputs
    return (hidden.to(weight.dtype), *rest)


def _takes_trees(model: PreTrainedModel, expected: Tensor, max_seq_length: int) -> bool:
    config = model.config.get_text_config()
    if _limit(config, "attention_chunk_size") < max_seq_length:
        return False
    model.set_attn_implementation(TREE)
    try:
        states, windows = as_tree(model)
        window = _limit(config, "sliding_window")
        if close(model, states, expected) and (window >= max_seq_length or window in windows):
            return True
    except (TypeError, ValueError) as error:
        log.info("no trees: %s", error)
    return False


def _limit(config: PretrainedConfig, name: str) -> float:
    limit: int | None = getattr(config, name, None)
    return float("inf") if limit is None else limit
