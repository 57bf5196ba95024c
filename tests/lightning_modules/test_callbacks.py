"""The progress line and the figures of a fit, with a clock of the test's own and in a real fit."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_modules.callbacks import Progress, Resources, duration, peak_memory_bytes, progress_line


class TinyModule(pl.LightningModule):
    """One weight; two batches make one optimizer step."""

    steps_total = 4
    dtype_name = "fp32"

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.tokens_seen = self.optimizer_steps = 0
        self.last_loss = 0.0
        self._fail_at = fail_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self._fail_at:
            raise RuntimeError("broken batch")
        loss = (self.weight * batch).pow(2).mean()
        self.tokens_seen += batch.numel()
        self.last_loss = loss.item()
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.optimizer_steps += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Clock:
    """Advances by one second each time it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def fit(module: TinyModule, callback: pl.Callback) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.ones(8, 5)))


def test_a_progress_line_holds_what_a_reader_asks() -> None:
    line = progress_line(
        step=12, steps_total=80, epoch=1, loss=1.2341, tokens_per_second=411.6, seconds_left=100.2
    )
    assert line == "progress step 12/80 epoch 1 loss 1.234 tokens/s 412 time left 1m 40s"


def test_a_progress_line_leaves_out_an_unknown_time() -> None:
    line = progress_line(
        step=0, steps_total=80, epoch=0, loss=float("nan"), tokens_per_second=0, seconds_left=None
    )
    assert line == "progress step 0/80 epoch 0 loss nan tokens/s 0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 0s"),
        (100, "1m 40s"),
        (3600, "1h 0m"),
        (90061, "25h 1m"),
    ],
)
def test_a_duration_is_written_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("every", "steps"), [(0.0, [1, 2, 3, 4]), (5.0, [2, 4]), (1000.0, [4])])
def test_progress_is_limited_by_the_clock_and_always_tells_the_end(
    every: float, steps: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(TinyModule(), Progress(every, Clock()))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("progress ")]
    assert [int(line.split()[2].partition("/")[0]) for line in lines] == steps
    assert lines[-1].endswith("time left 0s")


def test_progress_of_a_resumed_job_counts_its_own_time_only(capsys: pytest.CaptureFixture[str]) -> None:
    module = TinyModule()
    module.steps_total, module.optimizer_steps, module.tokens_seen = 104, 100, 10**9
    fit(module, Progress(1000.0, Clock()))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("progress ")]
    assert "step 104/104 " in line
    assert float(line.split()[8]) < 100


def test_resources_are_the_fit_s_own() -> None:
    module = TinyModule()
    module.tokens_seen = 1000
    resources = Resources(clock=Clock())
    assert resources.summary() == {"device_seconds": 0.0, "job_tokens": 0}
    fit(module, resources)
    summary = json.loads(json.dumps(resources.summary()))
    assert 10**7 < summary.pop("peak_memory_bytes") <= peak_memory_bytes()
    assert summary == {
        "device": "cpu",
        "dtype": "fp32",
        "seconds": 1.0,
        "tokens": 40,
        "tokens_per_second": 40.0,
        "device_seconds": 2.0,  # its clock is looked at once more
        "job_tokens": 40,
    }
    assert resources.summary() == resources.summary(), "the clock stands still"


class Tags:
    """A record of tags and metrics, in which attempts before have left something."""

    def __init__(self, *left: str) -> None:
        self._left = list(left)
        self.told: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}

    def left(self, key: str) -> list[str]:
        return self._left

    def set_tag(self, key: str, value: str) -> None:
        self.told.append(json.loads(value))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics |= metrics


def test_resources_go_on_from_those_of_the_attempts_before() -> None:
    record: Any = Tags('{"device_seconds": 100.5, "job_tokens": 7}')
    clock = Clock()
    resources = Resources(record, clock, every_seconds=1000.0)
    resources.begin()
    clock.now += 50.0  # the weights are read
    resources.on_validation_batch_end()
    resources.on_validation_batch_end()
    fit(TinyModule(), resources)
    begun, validated, first_step = record.told
    assert begun == {"device_seconds": 101.5, "job_tokens": 7}
    assert validated["device_seconds"] > 150.5
    assert first_step["job_tokens"] == 7 + 5
    assert first_step["device_seconds"] > validated["device_seconds"]
    summary = resources.summary()
    assert (summary["tokens"], summary["job_tokens"]) == (40, 47)
    assert summary["seconds"] < 50 < summary["device_seconds"] - 100.5
    assert record.metrics == {key: summary[key] for key in ("device_seconds", "job_tokens")}


def test_resources_are_told_as_often_as_was_asked_for() -> None:
    record: Any = Tags()
    resources = Resources(record, Clock(), every_seconds=0.0)
    fit(TinyModule(), resources)
    assert [told["job_tokens"] for told in record.told] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    seconds = [told["device_seconds"] for told in record.told]
    assert seconds == sorted(seconds)
    assert "seconds" not in record.told[-1], "the fit has no end yet"
    resources.tell()
    assert record.told[-1] == resources.summary()


def test_nothing_is_told_before_anything_is_used() -> None:
    record: Any = Tags()
    Resources(record, Clock()).tell()
    assert record.told == []


def test_resources_of_a_fit_that_fails_are_known() -> None:
    resources = Resources(clock=Clock())
    with pytest.raises(RuntimeError, match="broken batch"):
        fit(TinyModule(fail_at=3), resources)
    assert resources.summary()["tokens"] == 15
