"""Speeds that were measured, kept and found by later jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_modules.kept import Kept
from lightning_modules.setting import Setting
from lightning_modules.speeds import Speed, Speeds, Stopwatch, machine
from tests.lightning_modules.tiny import LORA


def step(watch: Stopwatch, clock: list[float], seconds: float, *tokens: int) -> None:
    watch.on_train_batch_start()
    clock[0] += seconds
    watch.on_train_batch_end(None, None, None, [{"tokens": count} for count in tokens], 0)  # type: ignore[arg-type]


def validate(watch: Stopwatch, clock: list[float], seconds: float, tokens: int) -> None:
    watch.on_validation_batch_start()
    clock[0] += seconds
    watch.on_validation_batch_end(None, None, None, {"tokens": tokens}, 0, 0)  # type: ignore[arg-type]


def test_the_first_step_and_what_lies_between_steps_do_not_count() -> None:
    clock = [0.0]
    watch = Stopwatch(lambda: clock[0])
    validate(watch, clock, 2.0, 50)
    step(watch, clock, 100.0, 10)
    assert watch.speed() is None
    step(watch, clock, 1.0, 10, 20)
    clock[0] += 1000.0
    step(watch, clock, 2.0, 60)
    validate(watch, clock, 1.0, 25)
    assert watch.speed() == Speed(training=90 / 3, forward=75 / 3)


def test_without_a_forward_pass_its_speed_is_not_known() -> None:
    clock = [0.0]
    watch = Stopwatch(lambda: clock[0])
    for _ in range(2):
        step(watch, clock, 2.0, 10)
    assert watch.speed() == Speed(5.0, None)


def test_the_median_of_the_newest_is_found(tmp_path: Path) -> None:
    file = tmp_path / "speeds" / "measured.json"
    assert Speeds(file).median() is None
    for training in (1000.0, 7.0, 1.0, 3.0, 5.0, 9.0):  # the first is one too many
        Speeds(file).add(Speed(training, None if training == 7.0 else 10 * training))
    assert Speeds(file).median() == Speed(5.0, (30.0 + 50.0) / 2)


@pytest.mark.parametrize("text", ["", "[{}]", '[{"training": 1.0, "other": 2}]', "{"])
def test_a_file_that_cannot_be_read_holds_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    assert Speeds(tmp_path / "file").median() is None
    Speeds(tmp_path / "file").add(Speed(1.0, None))
    assert Speeds(tmp_path / "file").median() == Speed(1.0, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": LORA | {"rank": 8}},
        {"algorithm": None},
        {"data": {"batch_size": 4}},
        {"data": {"packed": True}},
        {"training": {"efficiency_config": {"enable_activation_checkpointing": True}}},
        {"runtime": {"attn_implementation": "eager"}},
        {"preference": {}},
        {"preference": {}, "runtime": {"reference_logprobs": "live"}},
    ],
)
def test_jobs_that_compute_otherwise_have_speeds_of_their_own(
    changes: dict[str, Any], make_spec: Any, tmp_path: Path
) -> None:
    kept = Kept(tmp_path / "cache", 2**30)

    def speeds(spec: Any, model: str = "base", length: int = 128) -> Speeds:
        return Speeds.of(Setting.of(spec), kept, [model], length)

    plain = make_spec()
    speeds(plain).add(Speed(7.0, None))
    same = make_spec(training={"n_epochs": 5}, runtime={"seed": 1}, train_data="/other", attempt=2)
    assert speeds(same).median() == Speed(7.0, None)
    assert speeds(make_spec(**changes)).median() is None
    assert speeds(plain, model="other").median() is None
    assert speeds(plain, length=64).median() is None


def test_a_processor_is_known_by_its_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n\nmodel name\t: Some CPU @ 3 GHz\n")
    name, threads = machine("cpu", cpuinfo)
    assert name == "Some CPU @ 3 GHz"
    assert threads >= 1
    assert machine("cpu", tmp_path / "missing")[0]
