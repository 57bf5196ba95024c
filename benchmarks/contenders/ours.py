"""The product: its job, trained by Lightning with its callbacks, recorded in a real MLflow server."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.contenders.rounds import ALPHA, BETA, LEARNING_RATE, RANK, Rounds, Task
from lightning_modules.lean_imports import leave_out_unused
from lightning_modules.record import open_record
from lightning_modules.train import PROGRESS_SECONDS
from post_training.schemas.trainer import TrackingTarget, TrainerSpec

LORA = {"type": "LoRA", "apply_lora_to_output": False, "rank": RANK, "alpha": ALPHA}
TARGETS: dict[str, dict[str, Any]] = {
    "qv": {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False},
    "all": {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
    },
}


def specification(task: Task, folder: Path) -> TrainerSpec:
    """Return the job: every round's rows in one epoch, in file order."""
    options = task.options
    raw = task.raw()
    if "answer" in options:  # rows of one length, which share no more than the system prompt
        raw = [{"question": f"{i}, count.", "answer": options["answer"]} for i in range(task.rows)]
    lines = [json.dumps(row) for row in raw] * options["rounds"]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    adapter = None if options.get("algorithm") == "full" else LORA | TARGETS[task.targets]
    algorithm = {"full": None, "qat": {"type": "QAT"} | options.get("quantizer", {})}
    request: dict[str, Any] = {
        "job_uuid": "benchmark",
        "training_config": {
            "n_epochs": 1,
            "max_steps_per_epoch": 0,
            "max_validation_steps": 0,
            "gradient_accumulation_steps": 1,
            "dtype": options.get("dtype", "bf16"),
            "data_config": {
                "dataset_id": "rows",
                "batch_size": task.batch_size,
                "shuffle": False,
                "data_format": "instruct",
            },
            "optimizer_config": {
                "optimizer_type": "adamw",
                "lr": LEARNING_RATE,
                "weight_decay": 0.0,
                "num_warmup_steps": 0,
            },
            "efficiency_config": {"enable_activation_checkpointing": options.get("checkpointing", False)},
        },
        "algorithm_config": algorithm.get(options.get("algorithm", "lora"), adapter),
        "hyperparam_search_config": {},
        "logger_config": {},
        "runtime": {"scheduler": "constant", "max_seq_length": options.get("length", 2048)},
    }
    if task.method == "dpo":
        request |= {"finetuned_model": "base", "algorithm_config": {"beta": BETA}}
        request["runtime"]["adapter"] = adapter
    client = MlflowClient(options["tracking_uri"])
    run = client.create_run(client.create_experiment(str(folder)))
    spec = {
        "request": request,
        "model": task.model,
        "train_data": str(folder / "rows.jsonl"),
        "validation_data": None,
        "checkpoint_dir": None,
        "work_dir": str(folder),
        "attempt": 1,
        "tracking": TrackingTarget(tracking_uri=options["tracking_uri"], run_id=run.info.run_id),
    }
    return TrainerSpec.model_validate(spec)


def ask_for_rounds(rounds: Rounds, steps: int) -> Any:
    """Make the callback that cuts the one epoch of a job into rounds, before whose first step it waits."""
    import lightning.pytorch as pl  # after leave_out_unused

    class AskForRounds(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % steps == 0:
                rounds.wait()

        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            rounds.losses.append(pl_module.last_loss)
            if (batch_idx + 1) % steps == 0:
                rounds.done()

    return AskForRounds()


def main() -> None:
    """Train until no more rounds are asked for."""
    rounds = Rounds()
    task = rounds.task
    with tempfile.TemporaryDirectory() as folder:
        spec = specification(task, Path(folder))
        leave_out_unused(spec)
        from lightning_modules.callbacks import Progress, Resources
        from lightning_modules.engine import compiling
        from lightning_modules.job import prepare_job
        from lightning_modules.references import compute_references, references_of

        compiling.LONG_JOB = 0 if task.options.get("compiled") else float("inf")
        record = open_record(spec)
        steps = -(-task.rows // task.batch_size)
        callbacks = [ask_for_rounds(rounds, steps), Progress(PROGRESS_SECONDS), Resources()]
        job = prepare_job(spec, record, callbacks)
        reference = 0.0
        if task.method == "dpo":  # what the job does first, timed apart: rounds share it
            parts = job.data.seen(1)
            for _ in range(2):  # the first time is the warm-up that the rounds have too
                started = time.perf_counter()
                for part in parts:
                    references_of(job.trainer, job.module, job.data, part)
                reference = (time.perf_counter() - started) / task.options["rounds"]
            compute_references(job.trainer, job.module, job.data, 1)
        batches = [batch for step in list(job.data.train_loader)[:steps] for batch in step]
        job.data.train_loader.load_state_dict({"epoch": 0, "position": 0})
        rounds.ready(
            tokens=sum(batch["tokens"] for batch in batches),
            computed=sum(batch["input_ids"].numel() for batch in batches),
            scored=sum(batch["scored"] for batch in batches),
            reference_seconds=reference,
        )
        job.run()


if __name__ == "__main__":
    main()
