"""What a training needs of a GPU's memory, by the estimate that a job makes before its first step.

Of published models' shapes; no weight is read. None of it was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedModel

from lightning_modules.base_model import meta_model
from lightning_modules.estimate import GIB, peak_of_training
from lightning_modules.memory_needs import activations, certain
from lightning_modules.setting import Setting
from lightning_modules.workload import Largest
from post_training.schemas.trainer import TrainerSpec

LENGTHS = (512, 2048, 8192)
"""Tokens of a sequence."""

QV: dict[str, Any] = {
    "type": "LoRA",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "apply_lora_to_mlp": False,
    "apply_lora_to_output": False,
    "rank": 8,
    "alpha": 16,
}
ALL = QV | {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
}


@dataclass(frozen=True)
class Method:
    """What of a request decides how much memory it takes, besides model and data."""

    algorithm: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None = None
    preference: bool = False
    live: bool = False

    def request(self, length: int, *, checkpointing: bool = False) -> dict[str, Any]:
        """Return a request of two steps, each of one row, or of one pair.

        :param length: tokens of a sequence at most.
        """
        runtime: dict[str, Any] = {"max_seq_length": length, "adapter": self.adapter}
        if self.live:
            runtime["reference_logprobs"] = "live"
        return {
            "job_uuid": "sizing",
            "training_config": {
                "n_epochs": 1,
                "max_steps_per_epoch": 2,
                "max_validation_steps": 0,
                "gradient_accumulation_steps": 1,
                "dtype": "fp32",
                "data_config": {
                    "dataset_id": "rows",
                    "batch_size": 1,
                    "shuffle": False,
                    "data_format": "instruct",
                },
                "optimizer_config": {
                    "optimizer_type": "adamw",
                    "lr": 1e-4,
                    "weight_decay": 0.0,
                    "num_warmup_steps": 0,
                },
                "efficiency_config": {"enable_activation_checkpointing": checkpointing},
            },
            "algorithm_config": self.algorithm,
            "hyperparam_search_config": {},
            "logger_config": {},
            "runtime": runtime,
            **({"finetuned_model": "base"} if self.preference else {}),
        }

    def spec(self, model: str, data: Path, work_dir: Path, request: Mapping[str, Any]) -> TrainerSpec:
        """Return what a trainer is told."""
        spec = {
            "request": request,
            "model": model,
            "train_data": str(data),
            "validation_data": None,
            "checkpoint_dir": None,
            "work_dir": str(work_dir),
            "attempt": 1,
            "tracking": None,
        }
        return TrainerSpec.model_validate(spec)


METHODS: dict[str, Method] = {
    "LoRA on q and v": Method(QV),
    "LoRA on all layers": Method(ALL),
    "the same, 4-bit base": Method(ALL | {"quantize_base": True}),
    "full": Method(None),
    "QAT 4w": Method({"type": "QAT", "quantizer_name": "int4_weight_only", "group_size": 32}),
    "DPO, LoRA on all layers": Method({"beta": 0.1}, ALL, preference=True),
    "the same, live reference": Method({"beta": 0.1}, ALL, preference=True, live=True),
}


def llama(
    hidden: int, layers: int, heads: int, keys: int, inner: int, vocabulary: int, tied: bool
) -> LlamaConfig:
    """Return the configuration of a model of Llama's architecture.

    :param hidden: width of the residual stream.
    :param keys: heads of keys and values.
    :param inner: width inside the gated layers.
    :param tied: whether the head's weights are the embedding's.
    """
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )


MODELS: dict[str, LlamaConfig] = {
    "SmolLM2 135M": llama(576, 30, 9, 3, 1536, 49152, True),
    "SmolLM2 360M": llama(960, 32, 15, 5, 2560, 49152, True),
    "Llama 3.2 1B": llama(2048, 16, 32, 8, 8192, 128256, True),
    "Llama 3.2 3B": llama(3072, 28, 24, 8, 8192, 128256, True),
    "Llama 3.1 8B": llama(4096, 32, 32, 8, 14336, 128256, False),
    "Llama 3.3 70B": llama(8192, 80, 64, 8, 28672, 128256, False),
}


def rows() -> Iterator[tuple[str, ...]]:
    """Yield model, method and GiB by length, the last with activation checkpointing too."""
    for name, config in MODELS.items():
        outline = meta_model(config)
        for method, what in METHODS.items():
            if what.live:
                continue  # it keeps no more: the reference's pass leaves nothing for a backward one
            sizes = [on_gpu(what, outline, length) for length in LENGTHS]
            sizes.append(on_gpu(what, outline, LENGTHS[-1], checkpointing=True))
            yield (name, method, *(f"{size / GIB:.1f}" for size in sizes))


def on_gpu(method: Method, outline: PreTrainedModel, length: int, *, checkpointing: bool = False) -> int:
    """Return the bytes of a step of one sequence, or of a pair of two, in bf16.

    :param outline: the model on the meta device.
    """
    request = method.request(length, checkpointing=checkpointing)
    spec = method.spec("", Path("rows.jsonl"), Path("."), request)
    setting = replace(Setting.of(spec), device="cuda", dtype="bf16")
    batch = Largest(length * (2 if method.preference else 1), length)
    return peak_of_training(
        certain(setting, outline), activations(setting, outline, batch, padded=False), accumulating=False
    )
