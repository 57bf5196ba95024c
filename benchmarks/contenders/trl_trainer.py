"""TRL's trainers: ``settings`` of the task are fields of their configs, ``weights`` the model's type."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.contenders.rounds import ALPHA, BETA, LEARNING_RATE, RANK, Rounds


class AskForRounds(TrainerCallback):
    """Waits before the first step of a round, and reports after the last one was logged."""

    def __init__(self, rounds: Rounds) -> None:
        self._rounds, self.steps = rounds, 0
        self._step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Wait for the next round."""
        if self._step % self.steps == 0:
            self._rounds.wait()
        self._step += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Report the round that has ended."""
        if "loss" not in logs:
            return
        self._rounds.losses.append(logs["loss"])
        if self._step % self.steps == 0:
            self._rounds.done()


class ReferencePass:
    """Measures how long TRL computes reference log-probabilities; what it does around that is left out.

    The first batch is computed twice, for the first time is the warm-up that the rounds have too.
    """

    def __init__(self, trainer: Any) -> None:
        self.seconds, self._warm = 0.0, False
        self._compute: Any = getattr(trainer, "compute_ref_log_probs", None)
        if self._compute is not None:
            trainer.compute_ref_log_probs = lambda *given: self._timed(*given)

    def _timed(self, *given: Any) -> Any:
        if not self._warm:
            self._warm = True
            self._compute(*given)
        started = time.perf_counter()
        answer = self._compute(*given)
        self.seconds += time.perf_counter() - started
        return answer


def main() -> None:
    """Train until no more rounds are asked for."""
    rounds = Rounds()
    task = rounds.task
    torch.manual_seed(0)
    config, trainer = (SFTConfig, SFTTrainer) if task.method == "sft" else (DPOConfig, DPOTrainer)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": task.batch_size,
        "num_train_epochs": 10_000,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,  # no clipping: the same optimization problem for all
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
    }
    if task.method == "dpo":
        settings["beta"] = BETA
    with tempfile.TemporaryDirectory() as folder:
        callback = AskForRounds(rounds)
        adapter = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["q_proj", "v_proj"] if task.targets == "qv" else "all-linear",
            task_type="CAUSAL_LM",
        )
        model = AutoModelForCausalLM.from_pretrained(
            task.model,
            dtype=getattr(torch, task.options.get("weights", "float32")),
            attn_implementation=task.options.get("attention", "sdpa"),
        )
        timed = ReferencePass(trainer)
        made: Any = trainer(
            model,
            args=config(output_dir=folder, **(settings | task.options["settings"])),
            train_dataset=Dataset.from_list(task.messages()),
            processing_class=AutoTokenizer.from_pretrained(task.model),
            peft_config=adapter,
            callbacks=[callback],
        )
        made._get_train_sampler = lambda dataset=None: SequentialSampler(made.train_dataset)
        batch_size = made.args.per_device_train_batch_size
        callback.steps = -(-len(made.train_dataset) // batch_size)
        once = bool(task.options["settings"].get("precompute_ref_log_probs"))
        rounds.ready(reference_seconds=timed.seconds if once else 0.0)
        made.train()


if __name__ == "__main__":
    main()
