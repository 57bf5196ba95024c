"""A trainer's output on a terminal and elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lightning_modules.callbacks import progress_line
from post_training.cli.progress import LINE, shown


@pytest.mark.parametrize(("seconds", "left"), [(100.0, "1m 40s"), (None, None)])
def test_a_trainers_line_is_read(seconds: float | None, left: str | None) -> None:
    line = progress_line(
        step=3, steps_total=10, epoch=1, loss=1.25, tokens_per_second=512.4, seconds_left=seconds
    )
    found = LINE.fullmatch(line)
    assert found is not None
    assert found.groupdict() == {
        "step": "3",
        "total": "10",
        "epoch": "1",
        "loss": "1.250",
        "speed": "512",
        "left": left,
    }


def test_a_loss_that_is_no_number_is_read_too() -> None:
    line = progress_line(
        step=1, steps_total=2, epoch=0, loss=float("nan"), tokens_per_second=1, seconds_left=None
    )
    assert LINE.fullmatch(line) is not None


def test_elsewhere_every_line_is_printed_as_it_is() -> None:
    out = StringIO()
    with shown(Console(file=out, width=20)) as show:
        show("INFO [red]a long line that is wider than that[/]")
        show("progress step 1/2 epoch 0 loss 1.000 tokens/s 5")
    assert out.getvalue().splitlines() == [
        "INFO [red]a long line that is wider than that[/]",
        "progress step 1/2 epoch 0 loss 1.000 tokens/s 5",
    ]


def test_on_a_terminal_progress_is_one_live_line() -> None:
    out = StringIO()
    with shown(Console(file=out, width=120, force_terminal=True, color_system=None)) as show:
        show("INFO [x] begins")
        show("progress step 1/4 epoch 0 loss 1.234 tokens/s 56 time left 1m 40s")
    printed = out.getvalue()
    assert "INFO [x] begins" in printed
    assert "progress step" not in printed
    for part in ("training", "step 1/4", "loss 1.234", "56 tokens/s", "1m 40s left"):
        assert part in printed
