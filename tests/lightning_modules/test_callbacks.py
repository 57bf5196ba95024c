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
    resources = Resources(Clock())
    assert resources.summary() == {}
    fit(module, resources)
    summary = json.loads(json.dumps(resources.summary()))
    assert 10**7 < summary.pop("peak_memory_bytes") <= peak_memory_bytes()
    assert summary == {
        "device": "cpu",
        "dtype": "fp32",
        "seconds": 1.0,
        "tokens": 40,
        "tokens_per_second": 40.0,
    }


def test_resources_of_a_fit_that_fails_are_known() -> None:
    resources = Resources(Clock())
    with pytest.raises(RuntimeError, match="broken batch"):
        fit(TinyModule(fail_at=3), resources)
    assert resources.summary()["tokens"] == 15
