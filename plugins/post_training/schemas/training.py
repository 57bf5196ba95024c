"""How training runs: data, optimizer, efficiency, schedule, and where it runs."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from post_training.schemas.algorithms import LoraFinetuningConfig
from post_training.schemas.base import Count, StrictModel

RESERVED_TAG_PREFIXES = ("post_training.", "airflow.", "mlflow.")
"""Tags of a run that the service and MLflow write themselves."""


MAX_TAG_KEY_LENGTH, MAX_TAG_LENGTH = 250, 5000
"""Characters that MLflow keeps of a tag; it cuts longer ones in silence."""

MAX_SAMPLE_PROMPTS, MAX_PROMPT_LENGTH = 20, 4000
"""How many prompts are answered at each validation, and how many characters each may have."""


class OptimizerType(Enum):
    """Optimizers: Adam, AdamW (decoupled weight decay), SGD."""

    adam = "adam"
    adamw = "adamw"
    sgd = "sgd"


class DatasetFormat(Enum):
    """Shape of a row: one question with its answer, or a conversation."""

    instruct = "instruct"
    dialog = "dialog"


class DataConfig(StrictModel):
    """Which rows are read and how they become batches."""

    dataset_id: str = Field(
        min_length=1,
        description="Rows to train on: a registered id, a path under an allowed root (jsonl, json, csv,"
        " parquet), or a URI.",
    )
    batch_size: Count = Field(
        ge=1,
        description="Rows of one micro-batch, which go through the model together on a device: of preference"
        " data pairs, and with packed those that sequences share.",
    )
    shuffle: bool = Field(description="Whether each epoch has an order of its own, drawn from the seed.")
    data_format: DatasetFormat = Field(
        strict=False,
        description="What a row is: instruct, a question with its answer, or dialog, a conversation. In"
        " preference data: instruct, texts as they are, or dialog, JSON of messages.",
    )
    validation_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        description="Held-out rows, named as those to train on; null validates on the first of those, and"
        " the run says so.",
    )
    packed: bool | None = Field(
        default=False,
        description="Whether sequences share a row of max_seq_length tokens, without seeing each other: less"
        " padding.",
    )
    train_on_input: bool | None = Field(
        default=False, description="Whether the prompt's tokens count in the loss as well as the answer's."
    )


DATA_DEFAULTS = {"batch_size": 4, "shuffle": True, "data_format": "instruct"}
"""How data is read where a form or a body leaves it open; the published schema itself has no defaults."""


class OptimizerConfig(StrictModel):
    """The optimizer, its learning rate and its warm-up."""

    optimizer_type: OptimizerType = Field(
        strict=False,
        description="adam, adamw (decoupled weight decay) or sgd. All fields of the optimizer are given or"
        " none: none is adamw with the algorithm's own rate and a warm-up of 10 % of the steps.",
    )
    lr: float = Field(
        gt=0,
        description="Peak learning rate, reached at the end of the warm-up. Where no optimizer is given it is"
        " 2e-4 for LoRA, 2e-5 for full fine-tuning and QAT, and 5e-6 for preference jobs.",
    )
    weight_decay: float = Field(
        ge=0, description="Decay on weight matrices, not on norms and biases; 0 is none."
    )
    num_warmup_steps: Count = Field(
        ge=0, description="Optimizer steps of warm-up; step k of n has learning rate lr · k / n."
    )


class EfficiencyConfig(StrictModel):
    """Trades of time for memory; what the hardware cannot do is refused."""

    enable_activation_checkpointing: bool | None = Field(
        default=False, description="Recompute activations in the backward pass instead of keeping them."
    )
    enable_activation_offloading: bool | None = Field(
        default=False, description="Keep activations in host memory between forward and backward (GPU)."
    )
    memory_efficient_fsdp_wrap: bool | None = Field(
        default=False,
        description="Gather embedding and head only while they are used, apart from the layers; refused"
        " without runtime.strategy fsdp.",
    )
    fsdp_cpu_offload: bool | None = Field(
        default=False,
        description="Keep divided weights and the optimizer's state in host memory; refused without GPUs and"
        " runtime.strategy fsdp.",
    )


class TrainingConfig(StrictModel):
    """The training loop."""

    n_epochs: Count = Field(ge=1, description="Passes over the training data.")
    max_steps_per_epoch: Count | None = Field(
        default=1, ge=0, description="Optimizer steps per epoch; 0 or null is the whole epoch."
    )
    gradient_accumulation_steps: Count = Field(
        default=1, ge=1, description="Micro-batches summed into one optimizer step."
    )
    max_validation_steps: Count | None = Field(
        default=1, ge=0, description="Batches of each validation on each device; null is all of them, 0 none."
    )
    data_config: DataConfig | None = Field(default=None, description="Data; required by the training routes.")
    optimizer_config: OptimizerConfig | None = Field(
        default=None, description="Null is AdamW with the algorithm's own rate, cosine and 10 % warm-up."
    )
    efficiency_config: EfficiencyConfig | None = Field(default=None, description="Memory and compute trades.")
    dtype: Literal["bf16", "fp16", "fp32"] | None = Field(
        default="bf16",
        description="Type of the frozen weights and of the arithmetic: bf16, fp32, or fp16, which needs a"
        " GPU; null is bf16.",
    )

    @field_validator("efficiency_config")
    @classmethod
    def _says_something(cls, config: EfficiencyConfig | None) -> EfficiencyConfig | None:
        """Read a block without a flag that is set as no block, so that one meaning has one spelling."""
        return config if config is not None and any(flag for _, flag in config) else None


class RuntimeConfig(StrictModel):
    """Beyond the published schema: where and within which limits a job runs.

    Unset fields take the defaults of the ``post_training`` connection's ``runtime`` extra, and null is the
    same as unset. Only a null ``adapter`` says something: every weight, whatever the connection's default.
    """

    max_seq_length: Count = Field(
        default=2048, ge=8, description="Longest sequence in tokens; longer rows are cut at the end."
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="What adapters, order and dropout are drawn from: the same seed, the same training.",
    )
    devices: Count = Field(
        default=1,
        ge=1,
        description="Devices on each node, a process each: GPUs, or CPU cores where there is none.",
    )
    num_nodes: Count = Field(
        default=1, ge=1, description="Nodes that train one job together; more than one needs launcher ray."
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description="How a job spreads over several devices: each has the whole model (ddp, and auto), or a"
        " part of the weights (fsdp).",
    )
    launcher: Literal["local", "ray"] = Field(
        default="local",
        description="What starts the trainer: local, a process of the task's on its worker, or ray, a job of"
        " the deployment's Ray cluster; while that trains the task takes no slot.",
    )
    attn_implementation: Literal["sdpa", "eager"] = Field(
        default="sdpa",
        description="How attention is computed: eager is as the model is written; with sdpa kernels that skip"
        " what is masked are used, wherever they compute the same.",
    )
    save_total_limit: Count | None = Field(
        default=None, ge=1, description="Checkpoints kept, newest first; null keeps all of them."
    )
    save_every_n_steps: Count | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps between two saves of the state that a retry goes on from, beside those"
        " at each epoch's end; null leaves it to the clock.",
    )
    save_every_n_minutes: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Minutes between two such saves; null without save_every_n_steps is one, or so many that"
        " saving takes 2 % of the time.",
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="Learning rate after the warm-up: cosine or linear decay to 0, or constant.",
    )
    max_bad_row_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the rows that may be unreadable and are skipped; more of them fail the job"
        " before it trains.",
    )
    export: Literal["adapter", "merged"] | None = Field(
        default=None,
        description="Form of a LoRA checkpoint: the adapter alone, or merged into its base; null is the"
        " adapter, and merged where the job started from an adapter.",
    )
    adapter: LoraFinetuningConfig | None = Field(
        default=None,
        description="Adapters for a preference or QAT job, whose algorithm_config has no place for them;"
        " null trains every weight, unset takes the deployment's default.",
    )
    reference_logprobs: Literal["precomputed", "live"] | None = Field(
        default=None,
        description="Preference jobs: the reference's log-probabilities are computed once before training,"
        " or at each step with the adapters switched off; null is precomputed.",
    )


NULL_IS_SAID = frozenset({"adapter"})
"""Fields of ``runtime`` in which null is a value of its own."""


def _no_number(value: Any) -> Any:
    """Refuse 1 and 0, which a literal true and false take for themselves."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError("literal_error", "Input should be True, False or 'all'")
    return value


SamplePrompts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]],
    Field(max_length=MAX_SAMPLE_PROMPTS),
]


class LoggerConfig(StrictModel):
    """What ``logger_config`` may hold."""

    experiment_name: str | None = Field(
        default=None, min_length=1, max_length=200, description="MLflow experiment; null is the connection's."
    )
    run_name: str | None = Field(
        default=None, min_length=1, max_length=200, description="MLflow run name; null is the job's id."
    )
    tags: dict[str, str] = Field(default_factory=dict, description="Further tags of the MLflow run.")
    log_every_n_steps: Count = Field(
        default=1, ge=1, description="Optimizer steps between two points of the training metrics."
    )
    log_model: Annotated[Literal[True, False, "all"], BeforeValidator(_no_number)] = Field(
        default="all",
        description="Checkpoints that become MLflow models: all, true for the last one only, or false for"
        " none, which needs a checkpoint_dir.",
    )
    sample_prompts: SamplePrompts | None = Field(
        default=None,
        description="Prompts that the model answers at each validation; the answers are a table of the run."
        " null: it answers three rows of the validation data, at the job's end; [] answers none.",
    )
    log_figures: bool = Field(
        default=True,
        description="Whether the run has pictures at the job's end: curves, the rows' lengths, of preference"
        " jobs the reward margins.",
    )

    @field_validator("tags")
    @classmethod
    def _leaves_our_tags(cls, tags: dict[str, str]) -> dict[str, str]:
        taken = sorted(key for key in tags if key.startswith(RESERVED_TAG_PREFIXES))
        if taken:
            raise ValueError(f"keys must not start with {', '.join(RESERVED_TAG_PREFIXES)}, got {taken[0]!r}")
        for key, value in tags.items():
            if not key or len(key) > MAX_TAG_KEY_LENGTH or len(value) > MAX_TAG_LENGTH:
                raise ValueError(
                    f"a key may have {MAX_TAG_KEY_LENGTH} characters and a value {MAX_TAG_LENGTH},"
                    f" got {len(key)} and {len(value)} at {key[:40]!r}"
                )
        return tags
