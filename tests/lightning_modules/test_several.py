"""Two processes against one that has as many rows in each step: the same curves, and the same weights.

All jobs are trained by the same two processes over gloo, one after the other: what takes the time is to start
them. They share no folder, as on two machines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules.ranks import ALONE
from lightning_modules.samples import SAMPLES_TABLE
from post_training.schemas import record as names
from post_training.schemas.trainer import TrainerSpec
from post_training.standalone_layout import free_ports
from tests.lightning_modules.several import train
from tests.lightning_modules.tiny import LORA, PAIRS, ROWS
from tests.lightning_modules.trainers import ROOT, write

WORLD, EPOCHS = 2, 2
SAME = (
    names.METRIC_TRAIN_LOSS,
    names.METRIC_VALIDATION_LOSS,
    names.METRIC_PERPLEXITY,
    names.METRIC_GRADIENT_NORM,
    names.METRIC_LEARNING_RATE,
    names.METRIC_TOKENS_SEEN,
    names.METRIC_EPOCH,
    names.METRIC_PROGRESS,
)
OF_PAIRS = (
    names.METRIC_REWARD_CHOSEN,
    names.METRIC_REWARD_REJECTED,
    names.METRIC_REWARD_ACCURACY,
    names.METRIC_REWARD_MARGIN,
    names.METRIC_REWARD_CLIPPED,
    names.METRIC_KL,
)
"""Also as those of validations."""

QAT = {"type": "QAT", "quantizer_name": "int4_weight_only", "group_size": 16}
SGD = {"optimizer_config": {"optimizer_type": "sgd", "lr": 0.01, "weight_decay": 0.0, "num_warmup_steps": 0}}
"""Adam makes whole steps of the last bits of gradients, and a whole step is another level of a weight."""
FSDP, APART = {"strategy": "fsdp"}, {"efficiency_config": {"memory_efficient_fsdp_wrap": True}}
ALL_MODULES = LORA | {"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True}


SAMPLES = {"sample_prompts": ["How many apples?"]}


@dataclass(frozen=True)
class Case:
    """A job, and how it is begun and ended where that is not by both processes.

    :param changes: of the request.
    :param begun_by: processes that train its first two steps, if not both; both go on from there.
    :param ended_by: processes that go on after two steps, if not both.
    :param tolerance: relative, of every metric.
    """

    changes: dict[str, Any]
    begun_by: int = WORLD
    ended_by: int = WORLD
    tolerance: float = 1e-5


CASES = {
    "lora": Case({"training": {"gradient_accumulation_steps": 2}}),
    "lora packed": Case({"data": {"packed": True, "batch_size": 1}}, ended_by=1),
    "full": Case({"algorithm": None}, ended_by=1),
    "qat": Case({"algorithm": QAT, "training": SGD}, tolerance=5e-3),
    "dpo": Case({"preference": {}}, begun_by=1),
    "dpo kto": Case({"preference": {"loss_type": "kto_pair"}, "runtime": {"reference_logprobs": "live"}}),
    "fsdp lora": Case(
        {"runtime": FSDP, "algorithm": ALL_MODULES, "training": APART, "logger": SAMPLES}, ended_by=1
    ),
    "fsdp lora merged": Case({"runtime": FSDP | {"export": "merged"}}),
    "fsdp full": Case({"runtime": FSDP, "algorithm": None, "training": APART}, begun_by=1),
    "fsdp full resumed": Case({"runtime": FSDP, "algorithm": None}, ended_by=1),
    "fsdp qat": Case({"runtime": FSDP, "algorithm": QAT, "training": SGD}, tolerance=5e-3),
    "fsdp dpo": Case({"runtime": FSDP, "preference": {}}),
    "fsdp dpo live": Case({"runtime": FSDP | {"reference_logprobs": "live"}, "preference": {}}),
}


def start_together(arguments: Sequence[Sequence[str]]) -> None:
    """Run both processes to their end, as if each were on a machine of its own.

    :param arguments: of each one.
    """
    (port,) = free_ports(1)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    command = [sys.executable, "-m", "tests.lightning_modules.several"]
    processes = [
        subprocess.Popen(
            [*command, *own],
            env=environment | {"RANK": str(rank), "GROUP_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )
        for rank, own in enumerate(arguments)
    ]
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[TrainerSpec, TrainerSpec]]:
    """For each case the job of two devices, and that of one with as many rows in a step."""
    return {}


@pytest.fixture
def pair_of(trained: Any, make_spec: Any, tmp_path_factory: Any) -> Callable[[str], Any]:
    """Return a case's two jobs; the first that asks has all of them trained."""

    def pair(name: str) -> Any:
        if not trained:
            folder = tmp_path_factory.mktemp("several")
            for each, case in CASES.items():
                trained[each] = specs_of(case, make_spec, folder / each.replace(" ", "-"))
            train_all(trained)
        return trained[name]

    return pair


def specs_of(case: Case, make_spec: Any, folder: Path) -> tuple[TrainerSpec, TrainerSpec]:
    """Nine rows: in the last step one process has none."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, (PAIRS if "preference" in case.changes else ROWS)[:9])))
    changes = {key: dict(value) if isinstance(value, dict) else value for key, value in case.changes.items()}
    data = {"batch_size": 2, "shuffle": True} | changes.pop("data", {})
    training = {"n_epochs": EPOCHS, "max_validation_steps": None} | changes.pop("training", {})
    runtime = changes.pop("runtime", {})

    def made(kind: str, data: Any, training: Any, runtime: Any) -> TrainerSpec:
        spec: TrainerSpec = make_spec(
            **changes,
            data=data,
            training=training,
            runtime=runtime,
            train_data=str(rows),
            work_dir=folder / kind,
        )
        return spec

    several = made("several", data, training, runtime | {"devices": WORLD})
    whole = training | {"efficiency_config": None}
    one = made(
        "one", data | {"batch_size": WORLD * data["batch_size"]}, whole, runtime | {"strategy": "auto"}
    )
    return several, one


def train_all(jobs: dict[str, tuple[TrainerSpec, TrainerSpec]]) -> None:
    """Train both jobs of each case."""
    arguments: list[list[str]] = [[], []]
    for name, (several, one) in jobs.items():
        case = CASES[name]
        train(one, ALONE)
        if case.begun_by == 1:
            train(several, ALONE, stop_at=2)
        for rank, folder in enumerate((several.work_dir, several.work_dir.with_name("elsewhere"))):
            file = write(several.model_copy(update={"work_dir": folder}))
            arguments[rank].append(str(file) if case.ended_by == WORLD else f"{file}@2")
    start_together(arguments)
    for name, (several, _) in jobs.items():
        if CASES[name].ended_by == 1:
            train(several, ALONE)


def points(spec: TrainerSpec) -> dict[str, dict[int, float]]:
    """Each metric's value by step, of which there is one."""
    found: dict[str, dict[int, float]] = {}
    for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for key, value in event.get("values", {}).items():
            assert event["step"] not in found.setdefault(key, {})
            found[key][event["step"]] = value
    return found


def samples(spec: TrainerSpec) -> list[list[Any]]:
    """Step, prompt and answer of each sample."""
    (file,) = spec.work_dir.rglob(SAMPLES_TABLE)
    rows: list[list[Any]] = json.loads(file.read_text())["data"]
    return rows


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(name: str, pair_of: Any) -> None:
    several, one = pair_of(name)
    expected, found = points(one), points(several)
    of_pairs = OF_PAIRS if "preference" in CASES[name].changes else ()
    for key in (*SAME, *of_pairs, *(f"{names.VALIDATION_PREFIX}{key}" for key in of_pairs)):
        assert found[key] == pytest.approx(expected[key], rel=CASES[name].tolerance, abs=1e-6), key
    if "logger" in CASES[name].changes:
        assert [(row[0], row[1]) for row in samples(several)] == [(row[0], row[1]) for row in samples(one)]
    for epoch in range(EPOCHS):
        folder = Path("checkpoints", f"epoch-{epoch}")
        (file,) = (path.name for path in (one.work_dir / folder).glob("*.safetensors"))
        weights, ours = (load_file(spec.work_dir / folder / file) for spec in (one, several))
        assert ours.keys() == weights.keys()
        if CASES[name].changes.get("algorithm") != QAT:  # whose weights fall on one level or the next
            for key, weight in weights.items():
                torch.testing.assert_close(ours[key], weight, rtol=0, atol=2e-5)
