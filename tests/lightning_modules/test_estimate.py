"""What is said before the first step, what is refused, and whether it comes true."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_modules import building, estimate
from lightning_modules.base_model import meta_model
from lightning_modules.checkpoint import RESUME_FILE
from lightning_modules.estimate import Estimate, check_memory, estimate_of, gib, peak_of_training
from lightning_modules.job import prepare_job
from lightning_modules.memory_limits import Limit
from lightning_modules.memory_needs import Certain
from lightning_modules.record import open_record
from lightning_modules.setting import Setting
from lightning_modules.speeds import Speed
from lightning_modules.train import main
from lightning_modules.workload import Largest, Workload, workload_of
from post_training.errors import HardwareError
from post_training.schemas.record import TAG_WARNING
from post_training.schemas.trainer import TrainerSpec
from tests.lightning_modules.tiny import LORA, TINY
from tests.lightning_modules.trainers import result_of, write

PARAMETERS = 44_192
"""Of the tiny Llama; see test_memory_needs."""

WORK = Workload(steps=9, tokens=600, exact=True, largest=Largest(80, 40))


def test_a_line_says_what_is_known() -> None:
    line = Estimate(WORK, 3, 2**30, Limit(3 * 2**29, "the cgroup's limit"), 100.2).line
    assert line == (
        "estimate: 9 optimizer steps, 600 tokens, 200 an epoch, 1.0 GiB of memory where 1.5 GiB are"
        " the cgroup's limit, time 1m 40s"
    )


def test_a_line_says_what_is_not_known() -> None:
    work = Workload(steps=9, tokens=600, exact=False, largest=Largest(80, 40))
    line = Estimate(work, 3, 2**20, Limit(2**30, "the cgroup's limit"), None).line
    assert "about 600 tokens, about 200 an epoch (from the rows that are tokenized so far)" in line
    assert line.endswith("time unknown before the first steps: no job of its kind was measured here yet")


def test_metrics_leave_out_an_unknown_time() -> None:
    limit = Limit(2**30, "")
    known = {"estimated_tokens": 600.0, "estimated_tokens_per_epoch": 200.0, "estimated_memory_bytes": 5.0}
    assert Estimate(WORK, 3, 5, limit, None).metrics == known
    assert Estimate(WORK, 3, 5, limit, 7.5).metrics == known | {"estimated_seconds": 7.5}


@pytest.mark.parametrize(("size", "text"), [(2**31, "2.0 GiB"), (2**27, "0.1 GiB"), (2**19, "0.5 MiB")])
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert gib(size) == text


def test_gradients_come_as_the_activations_go_unless_they_accumulate() -> None:
    needs = Certain(weights=1000, gradients=300, optimizer=600, loading=1000)
    assert peak_of_training(needs, 200, accumulating=False) == 1900
    assert peak_of_training(needs, 500, accumulating=False) == 2100
    assert peak_of_training(needs, 500, accumulating=True) == 2400


Limited = Callable[..., None]


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Limited:
    """Limit the memory, in bytes; of a GPU its own."""

    def limit(host: int, device: int | None = None) -> None:
        of_device = Limit(device if device is not None else host, "the memory of a card")
        monkeypatch.setattr(estimate, "host_limit", lambda: Limit(host, "the cgroup's limit"))
        monkeypatch.setattr(estimate, "device_limit", lambda device: of_device)

    return limit


def test_what_fits_to_the_byte_is_not_refused(make_spec: Any, limited: Limited) -> None:
    setting, outline = Setting.of(make_spec(algorithm=None)), meta_model(TINY["llama"])
    limited(4 * PARAMETERS, device=16 * PARAMETERS)
    needs = check_memory(setting, outline, 0)
    assert needs.certain.training == 16 * PARAMETERS
    limited(4 * PARAMETERS, device=16 * PARAMETERS - 1)
    with pytest.raises(HardwareError, match=f"at least {16 * PARAMETERS} bytes"):
        check_memory(setting, outline, 0)
    limited(4 * PARAMETERS - 1, device=16 * PARAMETERS)
    with pytest.raises(HardwareError, match=f"at least {4 * PARAMETERS} bytes .* its base model's weights"):
        check_memory(setting, outline, 0)


@pytest.mark.parametrize(
    ("changes", "named", "unnamed"),
    [
        ({"algorithm": None}, ["LoRA adapters", "quantize_base"], ["dtype bf16"]),
        ({}, ["dtype bf16", "quantize_base"], ["LoRA adapters"]),
        ({"algorithm": LORA | {"quantize_base": True}}, ["dtype bf16"], ["quantize_base", "LoRA adapters"]),
    ],
)
def test_a_refusal_names_what_would_need_less(
    changes: dict[str, Any], named: list[str], unnamed: list[str], make_spec: Any, limited: Limited
) -> None:
    limited(10**9, device=1000)
    with pytest.raises(HardwareError) as refused:
        check_memory(Setting.of(make_spec(**changes)), meta_model(TINY["llama"]), 0)
    sentence = str(refused.value)
    for part in [*named, "1000 (0.0 MiB: the memory of a card)", "batch_size", "max_seq_length"]:
        assert part in sentence
    for part in unnamed:
        assert part not in sentence


def test_what_cannot_fit_is_refused_before_a_weight_is_read(
    make_spec: Any, limited: Limited, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(building, "load_model", lambda source, **options: read.append(source))
    limited(10_000)
    spec = make_spec()
    assert main([str(write(spec))]) == 1
    result = result_of(spec)
    assert (result.status, result.permanent) == ("failed", True)
    assert result.error is not None
    assert re.search(r"needs at least \d+ bytes .* can have 10000 .*the cgroup's limit", result.error)
    assert "\n" not in result.error
    assert read == []


def lines_of(spec: TrainerSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines()]


def test_what_may_not_fit_is_trained_and_noticed(make_spec: Any, limited: Limited) -> None:
    limited(16 * PARAMETERS)  # the certain part of adapters fits, this process does not
    spec = make_spec()
    assert main([str(write(spec))]) == 0
    (warning, *_) = [line["value"] for line in lines_of(spec) if line.get("key") == TAG_WARNING][::-1]
    assert "the job may need" in warning
    assert "enable_activation_checkpointing" in warning


JOBS: dict[str, dict[str, Any]] = {
    "lora": {"training": {"n_epochs": 2, "gradient_accumulation_steps": 2}},
    "packed": {"training": {"n_epochs": 2}, "data": {"packed": True, "batch_size": 1}},
    "cut and shuffled": {"training": {"n_epochs": 3, "max_steps_per_epoch": 2}, "data": {"shuffle": True}},
    "pairs": {"preference": {}, "training": {"max_validation_steps": None}},
    "full": {"algorithm": None, "training": {"max_validation_steps": 0}},
}


@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_what_was_foreseen_is_trained(
    changes: dict[str, Any],
    make_spec: Any,
    tmp_path: Path,
    read_metrics: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    first = make_spec(**changes, work_dir=tmp_path / "first", cache_dir=tmp_path / "cache")
    assert main([str(write(first))]) == 0
    seen = result_of(first).metrics["tokens_seen"]
    assert read_metrics(first.work_dir, "estimated_tokens") == [seen]
    assert read_metrics(first.work_dir, "estimated_seconds") == []
    steps = len(read_metrics(first.work_dir, "train_loss"))
    assert f"estimate: {steps} optimizer steps, {seen:.0f} tokens, " in caplog.text
    assert f"estimated and used: {seen:.0f} and {seen:.0f} tokens, " in caplog.text
    assert "an unknown time and" in caplog.text

    caplog.clear()
    second = make_spec(**changes, work_dir=tmp_path / "second", cache_dir=tmp_path / "cache")
    assert main([str(write(second))]) == 0
    (seconds,) = read_metrics(second.work_dir, "estimated_seconds")
    assert seconds > 0
    assert "unknown" not in caplog.text


@pytest.fixture
def foreseen(make_spec: Any, tmp_path: Path) -> Callable[..., tuple[float, int]]:
    """Prepare a job; return the seconds that are estimated for it at a speed, and its tokens in an epoch."""

    def seconds(speed: Speed, **changes: Any) -> tuple[float, int]:
        folder = tmp_path / f"job-{len(list(tmp_path.iterdir()))}"
        spec = make_spec(**changes, work_dir=folder, cache_dir=tmp_path / "cache")
        made = prepare_job(spec, open_record(spec))
        outline = meta_model(made.module.language_model.config)
        epochs = spec.request.training_config.n_epochs
        work = workload_of(made.data.train_loader, epochs)
        needs = check_memory(made.setting, outline, 0)
        found = estimate_of(made.setting, made.data, work, outline, needs, speed).seconds
        assert found is not None
        return found, work.tokens // epochs

    return seconds


def test_time_is_that_of_steps_and_validations(foreseen: Any) -> None:
    everything = {"n_epochs": 2, "max_validation_steps": None}
    seconds, tokens = foreseen(Speed(10.0, 100.0), training=everything)
    assert seconds == pytest.approx(2 * tokens / 10 + 3 * tokens / 100)  # before, and after each epoch
    seconds, _ = foreseen(Speed(10.0, None), training=everything)
    assert seconds == pytest.approx(5 * tokens / 10)
    seconds, _ = foreseen(Speed(10.0, 100.0), training=everything | {"max_validation_steps": 0})
    assert seconds == pytest.approx(2 * tokens / 10)


def test_time_of_a_retry_is_that_of_what_is_left(foreseen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"n_epochs": 2, "max_validation_steps": None}  # five steps each
    monkeypatch.setattr(estimate, "readable_step", lambda file: 6 if file.name == RESUME_FILE.name else None)
    seconds, tokens = foreseen(Speed(10.0, 100.0), training=training, attempt=2)
    assert seconds == pytest.approx(2 * tokens * 4 / 10 / 10 + tokens / 100)


def test_time_of_pairs_has_the_reference_s_until_it_is_kept(
    foreseen: Any, make_spec: Any, run: Any, tmp_path: Path
) -> None:
    pairs: dict[str, Any] = {"preference": {}, "training": {"max_validation_steps": 0}}
    seconds, tokens = foreseen(Speed(10.0, 100.0), **pairs)
    assert seconds == pytest.approx(tokens / 10 + tokens / 100)
    run(make_spec(**pairs, cache_dir=tmp_path / "cache"))
    seconds, _ = foreseen(Speed(10.0, 100.0), **pairs)
    assert seconds == pytest.approx(tokens / 10)
