"""The trainer process: its result, its exit codes, its reaction to SIGTERM."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.process import StopRequestedError
from lightning_modules.train import failure_file, main
from lightning_modules.trained import TRAINED_FILE
from post_training.job_lock import claim
from post_training.schemas.record import TAG_WARNING
from post_training.schemas.trainer import RESULT_FILE, SPEC_FILE, TrainerSpec
from tests.lightning_modules.trainers import ROOT, finish, result_of, start, wait_for, write


@pytest.fixture(autouse=True)
def _restore_process() -> Iterator[None]:
    """Undo what main does to its process."""
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("lightning.pytorch").level
    environment = dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("lightning.pytorch").setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


def test_a_process_trains_to_the_end(make_spec: Any, tmp_path: Path) -> None:
    spec = make_spec(training={"n_epochs": 2}, checkpoint_dir=tmp_path / "copies")
    process = start(spec)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    result = result_of(spec)
    assert (result.status, result.error) == ("completed", None)
    assert [checkpoint.epoch for checkpoint in result.checkpoints] == [0, 1]
    assert (tmp_path / "copies" / "epoch-1" / "adapter_config.json").exists()
    assert result.metrics["progress"] == 1
    assert result.resources["dtype"] == "fp32"
    assert result.resources["tokens"] == result.metrics["tokens_seen"]
    assert "progress step 10/10" in output
    assert "Tip" not in output


def test_sigterm_stops_after_the_batch_without_a_result(make_spec: Any) -> None:
    spec = make_spec(training={"n_epochs": 100_000, "max_validation_steps": 0})
    process = start(spec)
    metrics = spec.work_dir / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and "train_loss" in metrics.read_text())
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=143)
    assert "stopped by SIGTERM" in output
    assert "Traceback" not in output
    assert not (spec.work_dir / RESULT_FILE).exists()
    assert (spec.work_dir / "resume" / "last.ckpt").exists()


HARD = {"dtype": "fp16"}
OFFLOAD = {"efficiency_config": {"enable_activation_offloading": True}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_data": "/no/rows.jsonl"}, "the data set /no/rows.jsonl does not exist"),
        ({"validation_data": "/no/rows.jsonl"}, "the data set /no/rows.jsonl does not exist"),
        ({"model": "/no/model"}, "the model /no/model does not exist"),
        ({"training": HARD}, "dtype fp16 needs a GPU: on this machine's CPU use bf16 or fp32"),
        ({"training": OFFLOAD}, "enable_activation_offloading moves activations off a GPU"),
        ({"data": {"data_format": "dialog"}}, "10 of 10 rows .* is 0: row 1: has neither a dialog"),
        ({"runtime": {"max_seq_length": 8}}, "row 1: the prompt is longer than max_seq_length"),
    ],
)
def test_what_cannot_be_trained_fails_in_one_sentence(
    changes: dict[str, Any], sentence: str, make_spec: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(**changes)
    assert main([str(write(spec))]) == 1
    result = result_of(spec)
    assert (result.status, result.permanent, result.diverged) == ("failed", True, False)
    assert result.checkpoints == []
    assert result.error is not None
    assert re.search(sentence, result.error)
    assert "\n" not in result.error
    assert "Traceback" not in capfd.readouterr().err


def test_a_training_that_diverged_says_so(make_spec: Any) -> None:
    optimizer = {"optimizer_type": "sgd", "lr": 1e30, "weight_decay": 0.0, "num_warmup_steps": 0}
    spec = make_spec(training={"optimizer_config": optimizer})
    assert main([str(write(spec))]) == 1
    result = result_of(spec)
    assert (result.status, result.permanent, result.diverged) == ("failed", True, True)


def test_an_unforeseen_error_shows_its_traceback_and_one_sentence(
    make_spec: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    spec = make_spec(checkpoint_dir=tmp_path / "file" / "copies")
    assert main([str(write(spec))]) == 1
    result = result_of(spec)
    assert result.error is not None
    assert result.error.startswith("NotADirectoryError: ")
    assert result.permanent
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "the spec is invalid: : Invalid JSON"), ("{}", "request: Field required")]
)
def test_a_spec_that_cannot_be_read_fails_before_the_imports(
    text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / SPEC_FILE).write_text(text)
    code = (
        "import sys, lightning_modules.train as t; r = t.main(sys.argv[1:]); print('torch' in sys.modules, r)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / SPEC_FILE)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'plugins'}:{ROOT}"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "False 1\n"
    assert sentence in (tmp_path / RESULT_FILE).read_text()


def tags(spec: TrainerSpec) -> dict[str, str]:
    lines = [json.loads(line) for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["key"]: line["value"] for line in lines if line["kind"] == "tag"}


def test_a_default_that_cuts_the_epoch_is_noticed(make_spec: Any, read_metrics: Callable[..., Any]) -> None:
    spec = make_spec(training={"n_epochs": 2})
    body = json.loads(spec.model_dump_json(exclude_unset=True))
    del body["request"]["training_config"]["max_steps_per_epoch"]
    spec = TrainerSpec.model_validate(body | {"work_dir": spec.work_dir})
    assert main([str(write(spec))]) == 0
    assert len(read_metrics(spec.work_dir, "train_loss")) == 2
    assert "max_steps_per_epoch is 1, its default" in tags(spec)[TAG_WARNING]
    assert "no validation_dataset_id" in tags(spec)[TAG_WARNING]


def test_validation_data_of_its_own_needs_no_notice(
    make_spec: Any, tmp_path: Path, read_metrics: Callable[..., Any]
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"question": "how many?", "answer": "none"}\n' * 3)
    spec = make_spec(validation_data=str(held_out), training={"max_validation_steps": None})
    (spec.work_dir / RESULT_FILE).write_text("of an earlier attempt")
    assert main([str(write(spec))]) == 0
    assert TAG_WARNING not in tags(spec)
    assert len(read_metrics(spec.work_dir, "validation_loss")) == 2


def test_without_validation_the_training_loss_stands_in_and_it_is_said(make_spec: Any) -> None:
    spec = make_spec(training={"max_validation_steps": 0})
    assert main([str(write(spec))]) == 0
    (checkpoint,) = result_of(spec).checkpoints
    assert checkpoint.training_metrics is not None
    assert checkpoint.training_metrics.validation_loss == checkpoint.training_metrics.train_loss
    assert "max_validation_steps is 0" in tags(spec)[TAG_WARNING]


def test_a_default_optimizer_trains(make_spec: Any, read_metrics: Callable[..., Any]) -> None:
    spec = make_spec(training={"optimizer_config": None, "dtype": None})
    assert main([str(write(spec))]) == 0
    assert read_metrics(spec.work_dir, "learning_rate")[0] == pytest.approx(2e-4)


def test_a_result_says_whose_it_is(make_spec: Any) -> None:
    for attempt_id, changes, code in (("0199-a", {"train_data": "/no/rows.jsonl"}, 1), ("0199-b", {}, 0)):
        spec = make_spec(**changes, attempt_id=attempt_id)
        claim(spec.work_dir, attempt_id)
        assert main([str(write(spec))]) == code
        assert result_of(spec).attempt_id == attempt_id


def test_what_is_trained_is_not_trained_again(
    make_spec: Any, read_metrics: Callable[..., Any], rows_file: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(rows_file, rows)
    spec = make_spec(training={"n_epochs": 2}, train_data=str(rows))
    assert main([str(write(spec))]) == 0
    first, losses = result_of(spec), read_metrics(spec.work_dir, "train_loss")
    assert (spec.work_dir / TRAINED_FILE).exists()
    shutil.rmtree(spec.work_dir / "resume")  # the training would begin anew
    rows.unlink()
    again = spec.model_copy(update={"begun": True, "attempt": 2})
    assert main([str(write(again))]) == 0
    assert result_of(again) == first
    assert read_metrics(spec.work_dir, "train_loss") == losses


@pytest.mark.parametrize(("claimed", "code"), [("0199-b", 143), ("0199-a", 0), ("0198-z", 0)])
def test_an_attempt_that_another_has_superseded_leaves_no_result(
    claimed: str, code: int, make_spec: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(attempt_id="0199-a")
    claim(spec.work_dir, claimed)
    assert main([str(write(spec))]) == code
    assert (spec.work_dir / RESULT_FILE).exists() is (code == 0)
    assert ("a newer attempt runs" in capfd.readouterr().err) is (code == 143)


def test_a_process_that_is_told_to_stop_by_the_first_has_not_failed(
    make_spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first alone sees what MLflow says."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**place, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)

    def told(*_: Any) -> None:
        raise StopRequestedError

    monkeypatch.setattr("lightning_modules.train.take_part", told)
    spec = make_spec()
    assert main([str(write(spec))]) == 0
    assert not (spec.work_dir / failure_file(1)).exists()


def test_a_superseded_attempt_s_failure_is_none(make_spec: Any) -> None:
    spec = make_spec(attempt_id="0199-a", train_data="/no/rows.jsonl")
    claim(spec.work_dir, "0199-b")
    (spec.work_dir / RESULT_FILE).write_text("the newer attempt's")
    assert main([str(write(spec))]) == 143
    assert (spec.work_dir / RESULT_FILE).read_text() == "the newer attempt's"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, []), ({"train_data": "/no/rows.jsonl"}, ["failed: the data set /no/rows.jsonl"])],
)
def test_a_result_that_a_full_disk_does_not_take_is_said_in_one_line(
    changes: dict[str, Any], said: list[str], make_spec: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(**changes)
    (spec.work_dir / f"{RESULT_FILE}.tmp").symlink_to("/dev/full")
    assert main([str(write(spec))]) == 1
    assert not (spec.work_dir / RESULT_FILE).exists()
    errors = capfd.readouterr().err
    for line in (*said, "failed: the result cannot be written: [Errno 28] No space left on device"):
        assert line in errors
    assert "Traceback" not in errors


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "usage: " in capsys.readouterr().err
