"""What is trained and how: LoRA, QAT, DPO."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from post_training.schemas.base import Count, StrictModel


class LoraFinetuningConfig(StrictModel):
    """Low-Rank Adaptation: frozen base, trained low-rank updates ``W + (alpha / rank) · B·A``.

    Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
    https://arxiv.org/abs/2106.09685, section 4.1.
    """

    type: Literal["LoRA"] = Field(
        default="LoRA",
        description="LoRA trains the adapters that the fields beside it describe; null trains every weight.",
    )
    lora_attn_modules: list[Annotated[str, Field(min_length=1)]] = Field(
        description="Attention projections that get an adapter: q_proj, k_proj, v_proj, output_proj"
        " (or o_proj); translated to the architecture's own names."
    )
    apply_lora_to_mlp: bool = Field(description="Whether the feed-forward projections get adapters too.")
    apply_lora_to_output: bool = Field(description="Whether the output head gets an adapter too.")
    rank: Count = Field(
        ge=1,
        description="Rank r of the update: A is (r, in_features), B is (out_features, r). 4 to 64 is usual.",
    )
    alpha: Count = Field(
        ge=1,
        description="Scaling numerator: the update is multiplied by alpha / rank. Twice the rank is usual.",
    )
    use_dora: bool | None = Field(
        default=False,
        description="Weight-decomposed LoRA (DoRA): a trained magnitude per output feature.",
    )
    quantize_base: bool | None = Field(
        default=False, description="Hold the frozen base weights in 4-bit NF4 (QLoRA)."
    )

    @model_validator(mode="after")
    def _has_a_target(self) -> LoraFinetuningConfig:
        if not (self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output):
            raise ValueError(
                "lora_attn_modules is empty and neither apply_lora_to_mlp nor apply_lora_to_output is true:"
                " nothing would be trained"
            )
        return self


class Quantizer(Enum):
    """Quantization schemes: 4-bit weights in groups, with or without 8-bit activations."""

    int8_dynamic_activation_int4_weight = "int8_dynamic_activation_int4_weight"
    int4_weight_only = "int4_weight_only"


QUANTIZER_ALIASES = {
    "8da4w-qat": Quantizer.int8_dynamic_activation_int4_weight,
    "Int8DynActInt4WeightQATQuantizer": Quantizer.int8_dynamic_activation_int4_weight,
    "int8_dynact_int4weight": Quantizer.int8_dynamic_activation_int4_weight,
    "4w-qat": Quantizer.int4_weight_only,
    "Int4WeightOnlyQATQuantizer": Quantizer.int4_weight_only,
}
"""Names that torchtune, torchao and clients of Llama Stack use for the same schemes."""


def _canonical_quantizer(name: Any) -> Any:
    return QUANTIZER_ALIASES.get(name, name) if isinstance(name, str) else name


class QATFinetuningConfig(StrictModel):
    """Quantization-aware training: fake-quantized forward passes, then a real conversion.

    Reference: torchao's ``QATConfig`` flow, https://docs.pytorch.org/ao/stable/ .
    """

    type: Literal["QAT"] = Field(
        default="QAT",
        description="LoRA trains adapters, QAT weights that are quantized in the end; null trains every"
        " weight. Each has fields of its own beside it; those of the other are left as they are.",
    )
    quantizer_name: Annotated[
        Quantizer,
        BeforeValidator(
            _canonical_quantizer,
            json_schema_input_type=Literal[
                "int8_dynamic_activation_int4_weight",
                "int4_weight_only",
                "8da4w-qat",
                "Int8DynActInt4WeightQATQuantizer",
                "int8_dynact_int4weight",
                "4w-qat",
                "Int4WeightOnlyQATQuantizer",
            ],
        ),
    ] = Field(
        strict=False,
        description="Quantization scheme: int8_dynamic_activation_int4_weight (8da4w-qat) or"
        " int4_weight_only (4w-qat).",
    )
    group_size: Count = Field(
        ge=1,
        description="Weights that share one scale, counted along in_features, which it must divide; 32 is"
        " usual.",
    )


AlgorithmConfig = Annotated[LoraFinetuningConfig | QATFinetuningConfig, Field(discriminator="type")]
"""The fine-tuning algorithm, told apart by ``type``."""


class RLHFAlgorithm(Enum):
    """Preference algorithms."""

    dpo = "dpo"


class DPOLossType(Enum):
    """Losses over reward differences; their formulas are in the preference losses."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"
    kto_pair = "kto_pair"


class DPOAlignmentConfig(StrictModel):
    """Direct Preference Optimization; every field is optional and neutral by default.

    A sequence's reward is ``clamp(reward_scale · beta · Σ_t gamma^t · ρ_t, ±reward_clip)`` with
    ``ρ_t = log π_θ − log π_ref`` over completion tokens.

    Reference: Rafailov et al., https://arxiv.org/abs/2305.18290, equation 7.
    """

    reward_scale: float = Field(default=1.0, gt=0, description="Factor on every reward; 1 is none.")
    reward_clip: float | None = Field(
        default=None, gt=0, description="Rewards are clamped to ± this value; null leaves them as they are."
    )
    epsilon: float = Field(
        default=1e-8,
        ge=0,
        description="Floor inside the logarithm of the sigmoid loss; added to the token count in ipo.",
    )
    gamma: float = Field(
        default=1.0, gt=0, le=1, description="Discount for later completion tokens; 1 is none."
    )
    beta: float = Field(
        default=0.1, gt=0, description="Strength of the pull towards the reference, in 1/nat."
    )
    loss_type: DPOLossType = Field(
        default=DPOLossType.sigmoid,
        strict=False,
        description="Loss over the rewards of chosen and rejected: sigmoid (DPO), hinge, ipo or kto_pair.",
    )
