"""Twenty optimizer steps of TRL's trainers and of ours: the curves are the same.

Both train the same model from the same files, in fp32 on the CPU, on the same rows in file order, at a
constant learning rate, without clipping. Both seed, load the model and only then inject the adapters, which
therefore begin alike. TRL tokenizes and masks by itself: it scores all that follows the prompt, and ours
would not score the newline that ChatML has after the end token, so the chat template here has none.

A step of several micro-batches: of SFT both divide the sum over the step's scored tokens by their number,
which TRL gets as ``num_items_in_batch``, so micro-batches of unlike size are compared too. Of DPO ours is
the mean over the step's pairs, and TRL's the mean of its micro-batches' means, in the loss and in the
metrics: they agree where the micro-batches have as many pairs, as they do here.

IPO's loss averages the log-ratios per token on both sides, but TRL's rewards, and the accuracy that comes of
them, are β times their sum. TRL has no ε in the sigmoid loss, which lowers ours by at most ε / σ(h).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.lightning_modules.tiny import CHATML, LORA, PAIRS, ROWS
from tests.tiny_model import train_tokenizer, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
"""TRL sets it in every config."""

STEPS, SEED, DECAY, MAX_LENGTH = 20, 7, 0.1, 128

Curve = list[float]
Ours = Callable[[str], Curve]
"""Reads a metric of ours by its name."""


@dataclass(frozen=True)
class Case:
    """What is trained on the ten rows or pairs.

    :param batch_size: rows or pairs of a micro-batch.
    :param accumulation: micro-batches of an optimizer step.
    :param lora: train adapters, else every weight.
    :param lr: a rate at which twenty steps learn much, and leave something to learn.
    :param preference: of DPO, the loss's parameters, whose names both sides share.
    """

    batch_size: int = 2
    accumulation: int = 1
    lora: bool = True
    lr: float = 0.01
    preference: Mapping[str, Any] | None = None

    @property
    def epochs(self) -> int:
        """Epochs that are ``STEPS`` optimizer steps altogether; the last step of each may be short."""
        return STEPS // -(-len(ROWS) // (self.batch_size * self.accumulation))

    def agrees_with(self, theirs: Curve) -> Any:
        """Allow for what fp32 does, and for little more: AdamW without decay is off by 4e-5 only.

        fp32 rounds by 6e-8, and SFT's curves differ by 4e-7 at most. Of DPO TRL rounds the sum over an
        answer, up to 150 nats, before it subtracts the reference's: 1e-5 each, times β, in a reward. A loss
        has no more, for its slope is at most 1, and neither has, as a share of it, the sigmoid loss's
        gradient.
        """
        rel, absolute = (5e-6, 0) if self.preference is None else (5e-5, 5e-5)
        return pytest.approx(theirs, rel=rel, abs=absolute)


SIGMOID = {"beta": 0.5}
HINGE = {"beta": 0.5, "loss_type": "hinge"}
IPO = {"beta": 0.5, "loss_type": "ipo"}
CASES = {
    "sft-lora": Case(),
    "sft-lora-accumulated": Case(batch_size=3, accumulation=2),  # 3 + 3 rows, then 3 + 1
    "sft-full": Case(lora=False, lr=0.001),
    "dpo-sigmoid": Case(preference=SIGMOID),
    "dpo-sigmoid-accumulated": Case(batch_size=1, accumulation=2, preference=SIGMOID),
    "dpo-hinge": Case(preference=HINGE),
    "dpo-full": Case(lora=False, lr=0.0003, preference=SIGMOID),  # TRL loads a second model as the reference
}
TRL_NAMES = {
    "train_loss": "loss",
    "gradient_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "tokens_seen": "num_tokens",
}
"""Our metric -> TRL's name for it; those of rewards have the same name."""
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
ACCURACY = "rewards/accuracies"


@dataclass(frozen=True)
class Theirs:
    """What a trainer of TRL's did.

    :param curves: the value at each step, by TRL's name.
    :param rows: its training data as it tokenized them.
    """

    curves: dict[str, Curve]
    rows: Any


@pytest.fixture(autouse=True)
def alone_and_quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep TRL from reporting its use to the hub, and data sets from drawing progress bars."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that ends a turn with its end token."""
    model = write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(model)
    return model


def conversations(rows: Sequence[Mapping[str, str]], columns: Mapping[str, tuple[str, str]]) -> Dataset:
    """Put messages into TRL's columns.

    :param columns: TRL's column -> ours and the role of its text.
    """
    return Dataset.from_list(
        [
            {theirs: [{"role": role, "content": row[ours]}] for theirs, (ours, role) in columns.items()}
            for row in rows
        ]
    )


def trl_settings(case: Case, output: Path) -> dict[str, Any]:
    """Return what TRL's two configs are to hold so that it trains as our spec says."""
    return {
        "output_dir": str(output),
        "max_steps": STEPS,
        "per_device_train_batch_size": case.batch_size,
        "gradient_accumulation_steps": case.accumulation,
        "train_sampling_strategy": "sequential",
        "max_length": MAX_LENGTH,
        "optim": "adamw_torch",
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,  # not on norms and biases: transformers knows them by name, we by shape
        "max_grad_norm": 0.0,  # no clipping
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl_trainer(case: Case, folder: Path, output: Path) -> Any:
    """Make TRL's trainer of a case."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    settings = trl_settings(case, output)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    shared = {
        "model": str(folder),
        "processing_class": AutoTokenizer.from_pretrained(folder),
        "peft_config": adapters if case.lora else None,
    }
    if case.preference is None:
        rows = conversations(ROWS, {"prompt": ("question", "user"), "completion": ("answer", "assistant")})
        return SFTTrainer(args=SFTConfig(**settings), train_dataset=rows, **shared)
    answers = {name: (name, "assistant") for name in ("chosen", "rejected")}
    pairs = conversations(PAIRS, {"prompt": ("prompt", "user")} | answers)
    return DPOTrainer(args=DPOConfig(**settings, **case.preference), train_dataset=pairs, **shared)


def train_with_trl(case: Case, folder: Path, output: Path) -> Theirs:
    """Train with TRL, and read what it logged."""
    trainer = trl_trainer(case, folder, output)
    trainer.train()
    # The last entry has the whole run's times instead.
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = {name: [entry[name] for entry in steps] for name in steps[0]}
    return Theirs(curves, trainer.train_dataset)


Train = Callable[[Case], tuple[Ours, Theirs]]


@pytest.fixture
def train(folder: Path, make_spec: Any, run: Any, read_metrics: Any, tmp_path: Path) -> Train:
    """Train a case on both sides."""

    def both(case: Case) -> tuple[Ours, Theirs]:
        theirs = train_with_trl(case, folder, tmp_path / "trl")
        optimizer = {"optimizer_type": "adamw", "lr": case.lr, "weight_decay": DECAY}
        spec = make_spec(
            model=str(folder),
            algorithm=LORA if case.lora else None,
            preference=case.preference,
            training={
                "n_epochs": case.epochs,
                "max_validation_steps": 0,
                "gradient_accumulation_steps": case.accumulation,
                "optimizer_config": optimizer | {"num_warmup_steps": 0},
            },
            data={"batch_size": case.batch_size},
            runtime={"scheduler": "constant", "seed": SEED, "max_seq_length": MAX_LENGTH},
        )
        run(spec)
        return partial(read_metrics, spec.work_dir), theirs

    return both


def check_curves(case: Case, ours: Ours, theirs: Theirs) -> None:
    """Compare what every case has; TRL's loss must have fallen, or there would be nothing to compare."""
    assert theirs.curves["loss"][-1] < theirs.curves["loss"][0]
    for name, trl_name in TRL_NAMES.items():
        assert len(ours(name)) == STEPS
        assert ours(name) == case.agrees_with(theirs.curves[trl_name]), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_curves_are_trl_s(case: Case, train: Train) -> None:
    ours, theirs = train(case)
    check_curves(case, ours, theirs)
    if case.preference is not None:
        for name in REWARDS:
            assert ours(name) == case.agrees_with(theirs.curves[name]), name
        # Before the first update the rewards are 0 but for rounding, and so is which one is higher.
        assert ours(ACCURACY)[1:] == theirs.curves[ACCURACY][1:]


def test_ipo_curves_are_trl_s_and_rewards_are_its_per_token(train: Train) -> None:
    case = Case(batch_size=1, preference=IPO)  # one pair a step: no mean hides how long its answers are
    ours, theirs = train(case)
    check_curves(case, ours, theirs)
    chosen, rejected = (per_token(theirs, side, case.epochs) for side in ("chosen", "rejected"))
    assert ours("rewards/chosen") == case.agrees_with(chosen)
    assert ours("rewards/rejected") == case.agrees_with(rejected)
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert ours("rewards/margins") == case.agrees_with(margins)
    assert ours(ACCURACY)[1:] == [float(margin > 0) for margin in margins[1:]]


def per_token(theirs: Theirs, side: str, epochs: int) -> Curve:
    """Divide the rewards of one side, of a pair a step, by the tokens of its answer."""
    tokens = [len(ids) for ids in theirs.rows[f"{side}_ids"]] * epochs
    return [reward / count for reward, count in zip(theirs.curves[f"rewards/{side}"], tokens, strict=True)]
