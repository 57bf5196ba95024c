"""What every algorithm does: learns, resumes, exports, reloads elsewhere, and records the same things."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from lightning_modules.flavor import write_flavor
from lightning_modules.job import prepare_job
from lightning_modules.process import StopRequestedError
from lightning_modules.record import open_record
from post_training.schemas.trainer import TrainerSpec
from tests.lightning_modules.tiny import LORA
from tests.tiny_model import write_tiny_model

EVERYWHERE = LORA | {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
}
QAT = {"type": "QAT", "quantizer_name": "8da4w-qat", "group_size": 16}
DPO: dict[str, Any] = {"preference": {"beta": 0.5}}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "full": {"algorithm": None},
    "lora": {"algorithm": LORA},
    "lora-packed": {"algorithm": LORA, "data": {"packed": True}, "runtime": {"max_seq_length": 64}},
    "lora-output": {"algorithm": EVERYWHERE | {"apply_lora_to_output": True}},
    "lora-merged": {"algorithm": EVERYWHERE, "runtime": {"export": "merged"}},
    "dora": {"algorithm": EVERYWHERE | {"use_dora": True}},
    "dora-merged": {"algorithm": LORA | {"use_dora": True}, "runtime": {"export": "merged"}},
    "qlora": {"algorithm": EVERYWHERE | {"quantize_base": True}},
    "qlora-merged": {"algorithm": LORA | {"quantize_base": True}, "runtime": {"export": "merged"}},
    "qat-8da4w": {"algorithm": QAT},
    "qat-4w": {"algorithm": QAT | {"quantizer_name": "int4_weight_only"}},
    "qat-adapters": {"algorithm": QAT, "runtime": {"adapter": EVERYWHERE}},
    "dpo-sigmoid-lora": DPO,
    "dpo-live-packed": DPO | {"data": {"packed": True}, "runtime": {"reference_logprobs": "live"}},
    "dpo-hinge-full": {"preference": {"loss_type": "hinge"}, "algorithm": None},
    "dpo-ipo-merged": {"preference": {"loss_type": "ipo", "beta": 0.5}, "runtime": {"export": "merged"}},
    "dpo-kto-dora": {"preference": {"loss_type": "kto_pair"}, "algorithm": LORA | {"use_dora": True}},
    "dpo-qlora": DPO | {"algorithm": LORA | {"quantize_base": True}},
}
METRICS = {
    "train_loss",
    "validation_loss",
    "perplexity",
    "epoch",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "peak_memory_bytes",
    "tokens_seen",
    "progress",
    "seconds_left",
    "checkpoint_bytes",
    "estimated_tokens",
    "estimated_tokens_per_epoch",
    "estimated_memory_bytes",
}
REWARDS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/clipped_fraction",
    "kl",
}
every_algorithm = pytest.mark.parametrize("changes", ALGORITHMS.values(), ids=ALGORITHMS)


Maker = Callable[..., TrainerSpec]


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are multiples of 64 weights: bitsandbytes itself reads no others on a CPU."""
    return write_tiny_model(tmp_path_factory.mktemp("wide-llama"), hidden_size=64, intermediate_size=128)


@pytest.fixture
def spec_of(make_spec: Any, wide_model_dir: Path) -> Maker:
    """Make the spec of an algorithm, changed further by keywords."""

    def make(changes: dict[str, Any], **more: Any) -> TrainerSpec:
        training = {"n_epochs": 3, "max_validation_steps": None} | more.pop("training", {})
        if (changes.get("algorithm") or {}).get("quantize_base"):
            more["model"] = str(wide_model_dir)
        made: TrainerSpec = make_spec(training=training, **changes, **more)
        return made

    return make


def lines(spec: TrainerSpec, kind: str) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


@every_algorithm
def test_learns_and_records(changes: dict[str, Any], spec_of: Maker, read_metrics: Any) -> None:
    spec = spec_of(changes)
    finished = prepare_job(spec, open_record(spec)).run()
    validation = read_metrics(spec.work_dir, "validation_loss")
    assert len(validation) == 4
    assert validation[-1] < validation[0]
    perplexity = read_metrics(spec.work_dir, "perplexity")
    if "preference" not in changes:
        assert perplexity == pytest.approx([math.exp(loss) for loss in validation])
    assert [checkpoint.epoch for checkpoint in finished.checkpoints] == [0, 1, 2]
    last = finished.checkpoints[-1].training_metrics
    assert last is not None
    assert (last.validation_loss, last.perplexity) == (validation[-1], perplexity[-1])
    of_method = REWARDS if "preference" in changes else set()
    expected = METRICS | of_method | {f"validation_{name}" for name in of_method}
    assert {name for line in lines(spec, "metrics") for name in line["values"]} == expected
    sizes = read_metrics(spec.work_dir, "checkpoint_bytes")
    folders = [Path(checkpoint.path) for checkpoint in finished.checkpoints]
    assert sizes == [sum(file.stat().st_size for file in f.glob("*.safetensors")) for f in folders]
    params = {line["key"]: line["value"] for line in lines(spec, "param")}
    assert 0 < int(params["trainable_parameters"]) <= int(params["total_parameters"])
    assert [line["context"] for line in lines(spec, "dataset")] == ["training"]


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@every_algorithm
def test_resumes_to_the_same_weights(changes: dict[str, Any], spec_of: Maker, tmp_path: Path) -> None:
    shuffled = changes | {"data": changes.get("data", {}) | {"shuffle": True}}
    whole = prepare_job(spec := spec_of(shuffled, work_dir=tmp_path / "whole"), open_record(spec))
    whole.run()
    spec = spec_of(shuffled, work_dir=tmp_path / "cut")
    stopped = prepare_job(spec, open_record(spec), should_stop=lambda: stopped.module.optimizer_steps >= 2)
    with pytest.raises(StopRequestedError):
        stopped.run()
    resumed = prepare_job(spec, open_record(spec))
    resumed.run()
    expected = weights(whole.module)
    assert weights(resumed.module).keys() == expected.keys()
    for name, weight in weights(resumed.module).items():
        assert torch.equal(weight, expected[name]), name


RELOADER = """
import json, mlflow.transformers, pathlib, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

for line in sys.stdin:
    job = json.loads(line)
    folder, options = pathlib.Path(job["folder"]), {"dtype": torch.float32}
    if job["four_bit_base"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=True,
        )
    if job["mlflow"]:
        loaded = mlflow.transformers.load_model(folder.as_posix(), return_type="components", dtype="float32")
        model = loaded["model"]
        assert loaded["tokenizer"].chat_template
    elif (folder / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(job["base"], **options)
        model = PeftModel.from_pretrained(base, folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = torch.arange(3, 30)[None]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        answer = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
    assert answer.shape[1] > ids.shape[1]
    torch.save(logits.float(), job["output"])
    print("loaded", folder, flush=True)
"""


@pytest.fixture(scope="module")
def reloader() -> Iterator[subprocess.Popen[str]]:
    """A process that knows transformers and peft, and nothing of ours."""
    process = subprocess.Popen(
        [sys.executable, "-c", RELOADER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        cwd="/",
    )
    with process:
        yield process


def reloaded(reloader: subprocess.Popen[str], folder: Path, **order: Any) -> torch.Tensor:
    """The logits of a checkpoint that the other process has loaded."""
    output = folder.with_suffix(".pt")
    assert reloader.stdin is not None
    assert reloader.stdout is not None
    print(json.dumps(order | {"folder": str(folder), "output": str(output)}), file=reloader.stdin, flush=True)
    assert reloader.stdout.readline() == f"loaded {folder}\n"
    logits: torch.Tensor = torch.load(output)
    return logits


@every_algorithm
def test_reloads_in_another_process_to_the_same_logits(
    changes: dict[str, Any], spec_of: Maker, reloader: subprocess.Popen[str]
) -> None:
    spec = spec_of(changes, training={"n_epochs": 1})
    job = prepare_job(spec, open_record(spec))
    (checkpoint,) = job.run().checkpoints
    folder = Path(checkpoint.path)
    four_bit = bool((changes.get("algorithm") or {}).get("quantize_base"))
    four_bit_base = four_bit and (folder / "adapter_config.json").exists()
    logits = reloaded(reloader, folder, base=spec.model, four_bit_base=four_bit_base, mlflow=False)
    with torch.no_grad():
        expected = job.module.model.eval()(input_ids=torch.arange(3, 30)[None]).logits.float()
    # bitsandbytes multiplies in bf16 on a CPU that has it, once the model is in evaluation mode.
    tolerance = 1e-2 if four_bit_base else 1e-3
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert not list(folder.glob("*.bin"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == ("peft" if (folder / "adapter_config.json").exists() else "transformers")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_flavor(
        folder, base=spec.model, architecture="LlamaForCausalLM", tokenizer=tokenizer, run_id="0123abcd"
    )
    through_mlflow = reloaded(reloader, folder, base=spec.model, four_bit_base=False, mlflow=True)
    # MLflow loads a 4-bit adapter's base as it lies there.
    tolerance = 0.5 if four_bit_base else 1e-3
    torch.testing.assert_close(through_mlflow, expected, rtol=tolerance, atol=tolerance)


@every_algorithm
def test_trains_in_bf16(changes: dict[str, Any], spec_of: Maker, read_metrics: Any) -> None:
    spec = spec_of(changes, training={"dtype": "bf16"})
    prepare_job(spec, open_record(spec)).run()
    validation = read_metrics(spec.work_dir, "validation_loss")
    assert validation[-1] < validation[0]


def test_the_suite_covers_every_loss() -> None:
    from post_training.schemas.algorithms import DPOLossType

    covered = {c["preference"].get("loss_type", "sigmoid") for c in ALGORITHMS.values() if "preference" in c}
    assert covered == {loss.value for loss in DPOLossType}
