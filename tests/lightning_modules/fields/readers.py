"""What a proof reads from a trial."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchao.quantization.qat.linear import FakeQuantizedLinear
from transformers import AutoModelForCausalLM

from lightning_modules.figures import FIGURES
from lightning_modules.module import STATE_KEY
from post_training.job_ids import TaskKey
from post_training.record import new_run
from post_training.schemas.record import TAG_JOB_UUID, TAG_WARNING
from post_training.schemas.trainer import CACHE_FOLDER
from post_training.schemas.training import RESERVED_TAG_PREFIXES
from tests.lightning_modules.fields.bench import Trial
from tests.lightning_modules.recorded import read_table
from tests.lightning_modules.test_preference import answer_log_prob

QUESTION_NUMBER = re.compile(r"(\d+)\?")
COLUMNS = (("question", "prompt"), ("answer", "chosen"))
"""A question's columns and its answer's, in rows and in pairs."""


def rows(trial: Trial, batch: Any) -> list[int]:
    """The numbers in a batch's questions, ascending: what is shared moves them within the batch."""
    texts = trial.tokenizer.batch_decode(batch["input_ids"])
    return sorted({int(n) for text in texts for n in QUESTION_NUMBER.findall(text)})


def steps(trial: Trial) -> int:
    """The optimizer steps of the whole job."""
    assert len(trial.watch.rates) == len(trial.watch.steps)
    return len(trial.watch.rates)


def trained_rows(trial: Trial) -> list[list[list[int]]]:
    """The rows of each optimizer step's micro-batches."""
    return [[rows(trial, batch) for batch in step] for step in trial.watch.steps]


def validated_rows(trial: Trial) -> list[int]:
    """The rows of the validation before the first step; the recorded perplexity must be that of theirs."""
    numbers = [n for step, batch in trial.watch.validated if step == 0 for n in rows(trial, batch)]
    source = Path(trial.spec.validation_data or trial.spec.train_data)
    model = AutoModelForCausalLM.from_pretrained(trial.spec.model)
    total = tokens = 0.0
    for row in map(json.loads, source.read_text().splitlines()):
        question, answer = (next(row[name] for name in names if name in row) for names in COLUMNS)
        if int(QUESTION_NUMBER.findall(question)[0]) in numbers:
            log_prob, scored = answer_log_prob(model, trial.tokenizer, question, answer)
            total, tokens = total - log_prob.item(), tokens + scored
    recorded = trial.points("perplexity").get(0)
    assert recorded == (pytest.approx(math.exp(total / tokens), rel=1e-5) if tokens else None)
    return numbers


def rates(trial: Trial) -> list[float]:
    """The optimizer's learning rate at each step."""
    return trial.watch.rates


def parameters(trial: Trial) -> tuple[int, int]:
    """How many numbers are trained, and how many layers compute with fake-quantized weights."""
    fake = sum(isinstance(module, FakeQuantizedLinear) for module in trial.model.modules())
    return sum(weight.numel() for weight in trial.weights.values()), fake


def adapters(trial: Trial) -> dict[str, int]:
    """The names of the projections that have an adapter, and how many have it."""
    paths = [re.sub(r"\.(weight_fake_quantizer|lora_A)\b.*", "", n) for n in trial.weights if "lora_A" in n]
    return dict(Counter(path.rpartition(".")[2] for path in paths))


def shapes(trial: Trial) -> set[tuple[int, ...]]:
    """The shapes of what is trained."""
    return {tuple(weight.shape) for weight in trial.weights.values()}


def scaling(trial: Trial) -> float:
    """The factor of B·A in what a trained adapter adds to its weight."""
    assert trial.finished is not None
    layer = trial.projection("q_proj")
    with torch.no_grad():
        if isinstance(layer, FakeQuantizedLinear):
            update = layer.weight_fake_quantizer[0]  # type: ignore[index]
            added, product = update(layer.weight) - layer.weight, update.lora_B @ update.lora_A
        else:
            added = (layer(torch.eye(32)) - layer.base_layer(torch.eye(32))).T
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return float((added * product).sum() / product.square().sum())


def magnitudes(trial: Trial) -> list[int]:
    """How many magnitudes two projections have; they begin at the norms of their rows."""
    found = []
    for name in ("q_proj", "v_proj"):
        layer = trial.projection(name)
        for vector in layer.lora_magnitude_vector.values():
            torch.testing.assert_close(vector.weight.detach(), layer.base_layer.weight.norm(dim=1))
            assert vector.weight.requires_grad
            found.append(vector.weight.numel())
    return found


def levels(trial: Trial) -> int:
    """The most values that there are in a block of 64 base weights."""
    with torch.no_grad():
        weight = trial.projection("q_proj").base_layer(torch.eye(64)).T
    return max(len(block.unique()) for block in weight.reshape(-1, 64))


def types(trial: Trial) -> tuple[torch.dtype, set[torch.dtype], set[torch.dtype]]:
    """Of a base weight, of what is trained, and of activations in training and validation."""
    seen: set[torch.dtype] = set()
    layer = trial.projection("o_proj")
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    assert trial.finished is not None
    return layer.weight.dtype, {weight.dtype for weight in trial.weights.values()}, seen


def attention(trial: Trial) -> str:
    """The attention function's name in transformers' table."""
    return str(trial.job.module.language_model.config._attn_implementation)


def layers(trial: Trial) -> int:
    """How many layers the trained model has."""
    assert trial.finished.checkpoints
    return int(trial.job.module.language_model.config.num_hidden_layers)


def references(trial: Trial) -> tuple[bool, bool]:
    """Whether the reference's log-probabilities come with a step's batch, and from a file."""
    ((batch, *_), *_) = trial.watch.steps
    folder = trial.spec.work_dir / CACHE_FOLDER / "references"
    return "reference" in batch, any(folder.rglob("*.safetensors"))


def warning(trial: Trial) -> str:
    """What the job's run warns of."""
    texts = [line["value"] for line in trial.lines("tag") if line["key"] == TAG_WARNING]
    return texts[-1]


def points(trial: Trial) -> list[int]:
    """The steps at which the training's metrics were recorded."""
    return list(trial.points("train_loss"))


def answered(trial: Trial) -> list[list[Any]]:
    """Step and prompt of each answer."""
    assert trial.finished is not None
    return [row[:2] for row in read_table(trial.spec.work_dir, "samples.json")]


def draws(trial: Trial) -> bool:
    """Whether there are pictures at the end."""
    assert trial.finished is not None
    return (trial.spec.work_dir / FIGURES).exists()


def new_run_of(trial: Trial) -> dict[str, Any]:
    """What the job's MLflow run is made with; of its tags, the caller's own and apart the job's id."""
    request = trial.spec.request
    run = new_run(request, TaskKey(request.method, request.job_uuid, "train"))
    own = {name: tag for name, tag in run["tags"].items() if not name.startswith(RESERVED_TAG_PREFIXES)}
    return {**run, "tags": own, "job_uuid": run["tags"][TAG_JOB_UUID]}


def identity(trial: Trial) -> set[str]:
    """The job's id as its checkpoint, its run and its folder of copies have it."""
    (checkpoint,) = trial.finished.checkpoints
    run, folder = new_run_of(trial), trial.spec.checkpoint_dir
    ids = {checkpoint.identifier.removesuffix("-epoch-0"), checkpoint.post_training_job_id}
    return ids | {run["job_uuid"], run["name"]} | ({folder.name} if folder else set())


def saves(trial: Trial) -> list[int]:
    """The optimizer steps done of each state that was saved for a retry, as its file says."""
    found: list[int] = []

    def logged(file: Path, **options: Any) -> None:
        found.append(torch.load(file, weights_only=True)[STATE_KEY]["optimizer_steps"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial.job.checkpoints.record, "log_state", logged)
        assert trial.finished is not None
    return found


def exports(trial: Trial) -> list[str]:
    """The listed exports, which must be what the job's folder holds at the end."""
    listed = [Path(checkpoint.path).name for checkpoint in trial.finished.checkpoints]
    assert listed == sorted(path.name for path in (trial.spec.work_dir / "checkpoints").iterdir())
    return listed


def kept(trial: Trial) -> list[str]:
    """Where the listed checkpoints lie: among the exports, which the record took, or among their copies."""
    return ["/".join(Path(checkpoint.path).parts[-2:]) for checkpoint in trial.finished.checkpoints]


def copies(trial: Trial) -> list[str]:
    """The copies of the exports, by their last three folders."""
    assert trial.finished is not None
    folder = trial.spec.checkpoint_dir
    found = folder.rglob("adapter_model.safetensors") if folder else []
    return sorted("/".join(path.parts[-4:-1]) for path in found)


def export(trial: Trial) -> Path:
    (checkpoint,) = trial.finished.checkpoints
    return Path(checkpoint.path)


def weight_files(trial: Trial) -> list[str]:
    """The files of an export's weights."""
    return sorted(path.name for path in export(trial).glob("*.safetensors"))


def grid(trial: Trial) -> tuple[tuple[int, ...], int, int]:
    """The shape of an exported projection's scales, and its lowest and highest level."""
    saved = load_file(export(trial) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj._weight"
    values = saved[f"{name}_qdata"]
    return tuple(saved[f"{name}_scale"].shape), int(values.min()), int(values.max())


def scheme(trial: Trial) -> tuple[bool, str]:
    """Whether an activation is lost beside one a thousand times its size, and the export's scheme."""
    large, both = torch.zeros(2, 1, 32)
    large[0, 0], both[0, 0], both[0, 1] = 1000, 1000, 1  # 256 levels from 0 to 1000 are 3.9 apart
    layer = trial.projection("q_proj")
    with torch.no_grad():
        lost = torch.equal(layer(large), layer(both))
    config = json.loads((export(trial) / "config.json").read_text())["quantization_config"]
    return lost, config["quant_type"]["default"]["_type"]
