"""The trainer process, asked to stop once and twice."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from post_training.cli.trainer import _Stop
from post_training.schemas.trainer import RESULT_FILE
from tests.cli.terminal import finished, start, wait_for


class Process:
    """Notes how it is stopped."""

    def __init__(self) -> None:
        self.stops: list[bool] = []

    def stop(self, *, at_once: bool = False) -> None:
        self.stops.append(at_once)


def test_the_first_call_is_gentle_and_the_second_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    stop, process = _Stop(), Process()
    stop.reach(process)  # type: ignore[arg-type]
    assert process.stops == []
    stop()
    stop()
    assert process.stops == [False, True]
    assert capfd.readouterr().err.count("the state is saved") == 1


def test_a_call_before_the_process_reaches_it_too() -> None:
    stop, process = _Stop(), Process()
    stop()
    stop.reach(process)  # type: ignore[arg-type]
    assert process.stops == [False]


def test_ctrl_c_twice_ends_at_once(request_file: Path, data: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('saving', flush=True));"
        " print('ready', flush=True); [time.sleep(0.1) for _ in range(3000)]"
    )
    process = start("run", request_file, trainer=f"['-c', {stubborn!r}]")
    log = data / "post_training_runs" / "lora" / "train-1.log"
    wait_for(process, lambda: log.exists() and "ready" in log.read_text())
    (trainer,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    wait_for(process, lambda: "saving" in log.read_text())
    process.send_signal(signal.SIGINT)
    finished(process, 130)
    assert not trainer.is_running()
    assert not (log.parent / RESULT_FILE).exists()
