"""Exports that others can read, and training that goes on where it was cut."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lightning_modules.attempts import Inputs
from lightning_modules.checkpoint import (
    RESUME_FILE,
    SAVE_INTERVAL_SECONDS,
    SAVE_SHARE,
    SaveInterval,
    prune,
    random_state,
    readable_step,
    restore_random_state,
    unmoved,
)
from lightning_modules.job import prepare_job
from lightning_modules.module import PostTraining
from lightning_modules.process import StopRequestedError
from lightning_modules.record import JobRecord, open_record
from post_training.schemas.trainer import TrainerSpec
from post_training.schemas.training import RuntimeConfig
from tests.lightning_modules.tiny import LORA

Run = Callable[..., Any]


def train(
    spec: TrainerSpec,
    record: JobRecord | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = lambda: 0.0,
) -> PostTraining:
    """Train, and return the module."""
    job = prepare_job(spec, record or open_record(spec), should_stop=should_stop, clock=clock)
    job.run()
    return job.module


LOGITS = """
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 30)[None]).logits, sys.argv[2])
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model.eval()(input_ids=torch.arange(3, 30)[None]).logits
    return answer


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_is_read_by_peft_in_a_new_process(dora: bool, make_spec: Any, tmp_path: Path) -> None:
    everything = {"use_dora": dora, "apply_lora_to_mlp": True, "apply_lora_to_output": True}
    spec = make_spec(algorithm=LORA | everything)
    module = train(spec)
    folder, file = spec.work_dir / "checkpoints" / "epoch-0", tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", LOGITS, str(folder), str(file)], check=True)
    torch.testing.assert_close(torch.load(file), logits(module.model))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == spec.model
    assert {"lm_head", "q_proj", "gate_proj"} <= set(config["target_modules"])
    assert all("lora" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_full_model_is_read_by_transformers(make_spec: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    spec = make_spec(algorithm=None)
    module = train(spec)
    folder = spec.work_dir / "checkpoints" / "epoch-0"
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(module.model))
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert not list(folder.glob("*.bin"))


def test_copies_do_not_follow_a_link_that_has_come_since(tmp_path: Path) -> None:
    folder = tmp_path.resolve() / "copies" / "job-1"
    assert unmoved(folder) == folder
    (tmp_path / "private").mkdir()
    (tmp_path / "copies").symlink_to(tmp_path / "private")
    with pytest.raises(NotADirectoryError, match="checkpoint_dir has become a symbolic link"):
        unmoved(folder)


def test_a_job_whose_checkpoint_dir_becomes_a_link_while_it_trains_fails(
    make_spec: Any, tmp_path: Path
) -> None:
    private, copies = tmp_path / "private", tmp_path / "copies"
    private.mkdir()
    spec = make_spec(checkpoint_dir=copies / "job-1")

    def replace_it() -> bool:
        if not copies.exists():
            copies.symlink_to(private)
        return False

    with pytest.raises(NotADirectoryError):
        train(spec, should_stop=replace_it)
    assert list(private.iterdir()) == []


def test_copies_and_the_limit(make_spec: Any, tmp_path: Path) -> None:
    spec = make_spec(
        training={"n_epochs": 3}, runtime={"save_total_limit": 2}, checkpoint_dir=tmp_path / "copies"
    )
    train(spec)
    for parent in (spec.work_dir / "checkpoints", tmp_path / "copies"):
        assert sorted(path.name for path in parent.iterdir()) == ["epoch-1", "epoch-2"]
        assert (parent / "epoch-2" / "adapter_model.safetensors").exists()
        assert (parent / "epoch-2" / "chat_template.jinja").exists()


def test_prune_counts_epochs_as_numbers(tmp_path: Path) -> None:
    for epoch in (2, 9, 10):
        (tmp_path / f"epoch-{epoch}").mkdir()
    prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch-9", "epoch-10"}


@pytest.mark.parametrize(
    ("asked", "interval"),
    [
        ({}, SaveInterval(None, SAVE_INTERVAL_SECONDS, SAVE_SHARE)),
        ({"save_every_n_steps": 3}, SaveInterval(3, None)),
        ({"save_every_n_minutes": 1.5}, SaveInterval(None, 90.0, 1.0)),
        ({"save_every_n_steps": 3, "save_every_n_minutes": 1.5}, SaveInterval(3, 90.0, 1.0)),
    ],
)
def test_what_is_asked_for_decides_when_the_state_is_saved(
    asked: dict[str, Any], interval: SaveInterval
) -> None:
    assert SaveInterval.of(RuntimeConfig(**asked)) == interval


@pytest.mark.parametrize(
    ("interval", "took", "pause"),
    [
        (SaveInterval(), 0.0, SAVE_INTERVAL_SECONDS),
        (SaveInterval(), 1.0, 60.0),  # 1 s is 2 % of 50 s
        (SaveInterval(), 3.0, 150.0),
        (SaveInterval(None, 90.0, 1.0), 3.0, 90.0),
        (SaveInterval(None, 2.0, 1.0), 3.0, 3.0),
        (SaveInterval(3, None), 3.0, math.inf),
    ],
)
def test_the_clock_leaves_so_much_time_to_training(interval: SaveInterval, took: float, pause: float) -> None:
    assert interval.pause(took) == pytest.approx(pause)


class Recording:
    """A record that remembers the states that it was given."""

    def __init__(self, record: JobRecord) -> None:
        self._record = record
        self.states: list[tuple[int, bool, str, bytes]] = []

    def log_state(self, file: Path, *, step: int, inputs: str, must: bool) -> None:
        self.states.append((step, must, inputs, file.read_bytes()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)


def test_the_record_is_given_each_state_and_told_which_is_an_epoch_s_end(make_spec: Any) -> None:
    spec = make_spec(**RESUMED, runtime={"save_every_n_steps": 2})
    record = Recording(open_record(spec))
    train(spec, record)
    assert [(step, must) for step, must, _, _ in record.states] == [
        (2, False),
        (3, True),
        (4, False),
        (6, True),
        (8, False),
        (9, True),
    ]
    assert {inputs for _, _, inputs, _ in record.states} == {
        Inputs((spec.work_dir / "resume" / "inputs.json").read_text()).digest
    }
    assert record.states[-1][3] == (spec.work_dir / "resume" / "last.ckpt").read_bytes()
    assert readable_step(spec.work_dir / RESUME_FILE) == 9


@pytest.mark.parametrize(("upload", "epochs"), [("all", [0, 1, 2]), (True, [2]), (False, [])])
def test_the_uploaded_epochs_are_those_that_the_record_was_given(
    upload: Any, epochs: list[int], make_spec: Any, tmp_path: Path
) -> None:
    spec = make_spec(**RESUMED, checkpoint_dir=tmp_path / "copies")
    job = prepare_job(spec, open_record(spec))
    job.checkpoints.upload = upload
    finished = job.run()
    assert [checkpoint.epoch for checkpoint in finished.checkpoints] == [0, 1, 2]
    assert finished.uploaded == epochs


def test_a_pruned_epoch_is_not_waited_for(make_spec: Any, run: Run) -> None:
    assert run(make_spec(**RESUMED, runtime={"save_total_limit": 2})).uploaded == [1, 2]


def test_random_state_goes_round_through_a_safe_file(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected


class Failing:
    """A record that breaks at the metrics of one step, once."""

    def __init__(self, record: JobRecord, step: int) -> None:
        self._record = record
        self._step = step

    def log_metrics(self, metrics: Any, step: int) -> None:
        if step == self._step:
            raise OSError("the disk is gone")
        self._record.log_metrics(metrics, step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._record, name)


RESUMED = {
    "training": {"n_epochs": 3, "gradient_accumulation_steps": 2},  # 3 steps an epoch
    "data": {"shuffle": True},
}


def trained(module: PostTraining) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def assert_same(resumed: PostTraining, whole: PostTraining) -> None:
    expected = trained(whole)
    assert expected
    for name, weight in trained(resumed).items():
        assert torch.equal(weight, expected[name]), name
    for name in ("optimizer_steps", "tokens_seen"):
        assert getattr(resumed, name) == getattr(whole, name)
    assert resumed.metrics["validation_loss"] == whole.metrics["validation_loss"]
    assert resumed.epoch_means.all() == whole.epoch_means.all()


def stopping(after: int) -> Callable[[], bool]:
    """Ask often, be told to stop from the given question on."""
    asked: Iterator[int] = iter(range(10**6))
    return lambda: next(asked) >= after


QUESTIONS = 22
"""How often a job of three epochs asks whether to stop: once at first, then in each epoch at three
steps' ends, within two of them, in the validation and at the epoch's end."""


@pytest.mark.parametrize(
    ("algorithm", "after"), [*((LORA, n) for n in range(1, QUESTIONS)), *((None, n) for n in (2, 3, 8, 9))]
)
def test_a_stopped_job_goes_on_to_the_same_weights(
    algorithm: Any, after: int, make_spec: Any, dropout_model: str, tmp_path: Path
) -> None:
    whole = train(make_spec(**RESUMED, algorithm=algorithm, model=dropout_model, work_dir=tmp_path / "whole"))
    spec = make_spec(**RESUMED, algorithm=algorithm, model=dropout_model, work_dir=tmp_path / "cut")
    with pytest.raises(StopRequestedError):
        train(spec, should_stop=stopping(after))
    assert_same(train(spec), whole)
    assert len(list((spec.work_dir / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("seconds", [0.0, SAVE_INTERVAL_SECONDS], ids=["epochs", "steps"])
def test_a_broken_job_goes_on_to_the_same_weights(
    step: int, seconds: float, make_spec: Any, dropout_model: str, tmp_path: Path
) -> None:
    whole = train(make_spec(**RESUMED, model=dropout_model, work_dir=tmp_path / "whole"))
    spec = make_spec(**RESUMED, model=dropout_model, work_dir=tmp_path / "cut")
    ticks = iter(range(10**6))
    with pytest.raises(OSError, match="the disk is gone"):
        train(spec, Failing(open_record(spec), step), clock=lambda: seconds * next(ticks))
    assert (spec.work_dir / "resume" / "last.ckpt").exists() is (step > 3 or (step > 1 and seconds > 0))
    assert_same(train(spec), whole)


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("left", [b"", b"\0" * 5000, None], ids=["empty", "zeros", "half"])
def test_a_state_that_cannot_be_read_is_removed_and_the_training_starts_anew(
    left: bytes | None,
    attempt: int,
    make_spec: Any,
    dropout_model: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = train(make_spec(**RESUMED, model=dropout_model, work_dir=tmp_path / "whole"))
    spec = make_spec(**RESUMED, model=dropout_model, work_dir=tmp_path / "cut")
    with pytest.raises(StopRequestedError):
        train(spec, should_stop=stopping(8))
    file = spec.work_dir / RESUME_FILE
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if left is None else left)
    assert_same(train(spec.model_copy(update={"attempt": attempt, "begun": attempt > 1})), whole)
    assert "last.ckpt cannot be read and is removed" in caplog.text


def test_a_full_disk_within_an_epoch_leaves_the_older_state(
    make_spec: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spec = make_spec(**RESUMED, runtime={"save_every_n_steps": 2})
    file = spec.work_dir / RESUME_FILE
    file.parent.mkdir()
    file.with_suffix(".tmp").symlink_to("/dev/full")  # the first save's draft
    record = Recording(open_record(spec))
    train(spec, record)
    assert [step for step, *_ in record.states] == [3, 4, 6, 8, 9]
    assert caplog.text.count("the state was not saved, the one before stays: [Errno 28] No space left") == 1


def test_a_full_disk_at_an_epoch_s_end_fails_and_leaves_no_draft(make_spec: Any) -> None:
    spec = make_spec(**RESUMED)
    draft = (spec.work_dir / RESUME_FILE).with_suffix(".tmp")
    draft.parent.mkdir()
    draft.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train(spec)
    assert not draft.is_symlink()


def test_a_finished_job_is_not_trained_again(make_spec: Any, run: Run) -> None:
    spec = make_spec(**RESUMED)
    first, second = run(spec), run(spec)
    assert second.checkpoints == first.checkpoints
    assert second.metrics == first.metrics


def test_the_resume_state_holds_the_trained_weights_alone(make_spec: Any) -> None:
    spec = make_spec()
    module = train(spec)
    state = torch.load(spec.work_dir / "resume" / "last.ckpt", weights_only=True)
    assert state["state_dict"].keys() == trained(module).keys()
    assert not list(spec.work_dir.rglob("*.tmp"))
