"""The launcher: which result a job has, and that nothing outlives it; once with real trainers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from lightning_modules import elastic
from lightning_modules.checkpoint import RESUME_FILE, readable_step
from lightning_modules.process_group import devices_here
from post_training.schemas.trainer import RESULT_FILE, TrainerSpec
from tests.lightning_modules.trainers import ROOT, finish, result_of, wait_for, write
from tests.waiting import wait_until

SCRIPTED = "tests.lightning_modules.scripted_rank"
SEVERAL = {"runtime": {"devices": 2}, "attempt_id": "a"}


@pytest.fixture(autouse=True)
def _restore_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the launcher does to its process."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'plugins'}:{ROOT}")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    environment = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


def scripted(spec: TrainerSpec, *acts: str) -> str:
    """Write what each process does; return the path of the spec."""
    path = write(spec)
    path.with_name("script.json").write_text(json.dumps(acts))
    return str(path)


@pytest.mark.parametrize(
    ("acts", "code", "told"),
    [
        (("complete", "end"), 0, None),
        (("fail", "wait"), 1, "rank 0"),
        (("wait", "fail"), 1, "rank 1"),
        (("wait", "die"), 1, "process 1 was killed by signal 9, after 1 restarts; out of memory is a usual"),
    ],
)
def test_the_job_s_result_is_that_of_the_first_to_fail(
    acts: tuple[str, str], code: int, told: str | None, make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "RESTARTS", 1)
    spec = make_spec(**SEVERAL)
    assert elastic.main([scripted(spec, *acts)], trainer=SCRIPTED) == code
    result = result_of(spec)
    assert (result.status, result.attempt_id) == ("failed" if code else "completed", "a")
    assert (told or "") in (result.error or "")
    assert result.permanent == ("fail" in acts)
    assert not (spec.work_dir / "torchrun").exists()


def test_an_attempt_that_nobody_wants_leaves_no_result(make_spec: Any) -> None:
    spec = make_spec(**SEVERAL)
    assert elastic.main([scripted(spec, "leave", "end")], trainer=SCRIPTED) == 143
    assert not (spec.work_dir / RESULT_FILE).exists()


def test_more_devices_than_there_are_fail_before_anything_starts(make_spec: Any) -> None:
    here, what = devices_here()
    spec = make_spec(runtime={"devices": here + 1})
    assert elastic.main([str(write(spec))]) == 1
    result = result_of(spec)
    assert result.error == (
        f"runtime.devices must be at most {here}, the {what} of this machine, got {here + 1}"
    )
    assert result.permanent


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start a launcher with arguments of its ``main`` in Python."""
    code = f"import sys; from lightning_modules.elastic import main; sys.exit(main({', '.join(arguments)}))"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def pids(spec: TrainerSpec) -> list[int]:
    """The processes that run."""
    files = [spec.work_dir / f"{rank}.pid" for rank in range(2)]
    return [int(file.read_text()) for file in files if file.exists() and file.read_text()]


def test_the_processes_end_with_a_launcher_that_is_killed(make_spec: Any) -> None:
    spec = make_spec(**SEVERAL)
    launcher = start(repr([scripted(spec, "wait deaf", "wait deaf")]), repr(SCRIPTED))
    wait_for(launcher, lambda: len(pids(spec)) == 2)
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not any(map(psutil.pid_exists, pids(spec))))
    assert not (spec.work_dir / RESULT_FILE).exists()


def test_killed_trainers_go_on_and_all_stop_when_they_are_asked(make_spec: Any) -> None:
    spec = make_spec(
        **SEVERAL | {"runtime": {"devices": 2, "strategy": "fsdp", "save_every_n_steps": 1}},
        training={"n_epochs": 100_000, "max_validation_steps": 0},
        logger={"log_model": True},
    )
    launcher = start(repr([str(write(spec))]))
    saved = lambda: readable_step(spec.work_dir / RESUME_FILE) or 0  # noqa: E731
    wait_for(launcher, saved)
    trainers = {int(child.environ()["RANK"]): child for child in psutil.Process(launcher.pid).children()}
    trainers[1].kill()
    wait_until(lambda: not any(trainer.is_running() for trainer in trainers.values()))
    before = saved()
    wait_for(launcher, lambda: saved() > before)
    again = psutil.Process(launcher.pid).children()
    launcher.terminate()
    output = finish(launcher, code=143)
    assert "process 1 was killed by signal 9; 3 restarts are left" in output
    assert "attempt 1 goes on from" in output
    assert "stopped by SIGTERM" in output
    assert not any(trainer.is_running() for trainer in again)
    assert not (spec.work_dir / RESULT_FILE).exists()
    steps = [
        event["step"]
        for event in map(json.loads, (spec.work_dir / "metrics.jsonl").read_text().splitlines())
        if "train_loss" in event.get("values", {})
    ]
    assert steps == list(range(1, len(steps) + 1)), "each step is recorded once"
    assert saved() >= len(steps) - 1, "an epoch's last step is saved after what follows it"
