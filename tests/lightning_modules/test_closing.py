"""What a job's record gets at its end: pictures of its own numbers, and the trained model's answers."""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lightning_modules import closing, flavor
from lightning_modules.checkpoint import RESUME_FILE
from lightning_modules.closing import MAX_NEW_TOKENS
from lightning_modules.generation import answers, prompt_ids
from lightning_modules.job import prepare_job
from lightning_modules.process import StopRequestedError
from lightning_modules.record import open_record
from post_training.errors import DivergenceError
from post_training.schemas.trainer import TrackingTarget, TrainerSpec
from tests.lightning_modules.recorded import begun, points, read_table, retried, table_of
from tests.lightning_modules.tiny import PAIRS, ROWS

SpecMaker = Callable[..., TrainerSpec]
OF_ALL = {"loss.png", "learning_rate.png", "gradient_norm.png", "row_lengths.png"}
CSV = "question,answer\n" + "\n".join(f"{row['question']},{row['answer']}" for row in ROWS)
ALL_PAIRS = {"max_validation_steps": None, "n_epochs": 2}


@pytest.fixture
def make_spec(make_spec: SpecMaker) -> SpecMaker:
    """Make specs whose record ends as it does by default."""

    def make(**changes: Any) -> TrainerSpec:
        logger = {"log_figures": True, "sample_prompts": None, **changes.pop("logger", {})}
        return make_spec(**changes, logger=logger)

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The pictures' axes by the files' names, as they are saved."""
    found: dict[str, Any] = {}
    save = closing.save

    def keep(figure: Any, file: Path) -> None:
        (found[file.name],) = figure.axes
        save(figure, file)

    monkeypatch.setattr(closing, "save", keep)
    return found


def curve(axes: Any, number: int = 0) -> tuple[list[float], list[float]]:
    line = axes.lines[number]
    return list(line.get_xdata()), list(line.get_ydata())


def test_curves_are_those_of_the_record(
    make_spec: SpecMaker, read_metrics: Any, drawn: dict[str, Any]
) -> None:
    spec = make_spec(training={"n_epochs": 2})
    prepare_job(spec, open_record(spec)).run()
    assert drawn.keys() == OF_ALL
    assert {file.name for file in (spec.work_dir / "figures").iterdir()} == OF_ALL
    steps = list(range(1, 11))
    assert curve(drawn["loss.png"]) == (steps, read_metrics(spec.work_dir, "train_loss"))
    assert curve(drawn["loss.png"], 1) == ([0, 5, 10], read_metrics(spec.work_dir, "validation_loss"))
    assert curve(drawn["learning_rate.png"]) == (steps, read_metrics(spec.work_dir, "learning_rate"))
    assert curve(drawn["gradient_norm.png"]) == (steps, read_metrics(spec.work_dir, "gradient_norm"))


def test_lengths_are_those_of_the_rows(
    make_spec: SpecMaker, tokenizer: PreTrainedTokenizerBase, rows_file: Path, drawn: dict[str, Any]
) -> None:
    spec = make_spec(validation_data=str(rows_file), data={"validation_dataset_id": "rows"})
    prepare_job(spec, open_record(spec)).run()
    lengths = [
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}], return_dict=True
            )["input_ids"]
        )
        for q, a in ((row["question"], row["answer"]) for row in ROWS)
    ]
    axes = drawn["row_lengths.png"]
    for bars in axes.containers:
        assert sum(bar.get_height() for bar in bars) == len(ROWS)
        across = [bar.get_x() for bar in bars if bar.get_height()]
        assert min(lengths) <= min(across) <= max(across) <= max(lengths)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"training (10 rows)", "validation (10 rows)", "cut at 128"} == set(names)


def test_margins_are_those_whose_mean_is_recorded(
    make_spec: SpecMaker, read_metrics: Any, drawn: dict[str, Any]
) -> None:
    spec = make_spec(preference={"beta": 0.1, "loss_type": "sigmoid"}, training=ALL_PAIRS)
    job = prepare_job(spec, open_record(spec))
    job.run()
    assert drawn.keys() == OF_ALL | {"reward_margins.png"}
    margins = job.module.distributions
    assert {name: len(values) for name, values in margins.items()} == {
        "rewards/margins": len(PAIRS),
        "validation_rewards/margins": len(PAIRS),
    }
    validated = read_metrics(spec.work_dir, "validation_rewards/margins")[-1]
    assert float(margins["validation_rewards/margins"].mean()) == pytest.approx(validated, rel=1e-5)
    trained = read_metrics(spec.work_dir, "rewards/margins")[-5:]
    assert float(margins["rewards/margins"].mean()) == pytest.approx(sum(trained) / 5, rel=1e-5)
    accuracy = read_metrics(spec.work_dir, "validation_rewards/accuracies")[-1]
    names = [text.get_text() for text in drawn["reward_margins.png"].get_legend().get_texts()]
    assert f"validation ({accuracy:.0%} above 0)" in names


def test_the_trained_model_answers_rows_of_the_data(
    make_spec: SpecMaker, tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = make_spec()
    (checkpoint,) = prepare_job(spec, open_record(spec)).run().checkpoints
    base = AutoModelForCausalLM.from_pretrained(spec.model)
    model = PeftModel.from_pretrained(base, checkpoint.path).eval().get_base_model()
    table = read_table(spec.work_dir, "sample_answers.json")
    assert [row[:3] for row in table] == [
        [number, row["question"], row["answer"]] for number, row in enumerate(ROWS[:3], start=1)
    ]
    for _, question, _, answer in table:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": question}])
        assert [answer] == answers(model, tokenizer, [ids], MAX_NEW_TOKENS)


def test_rows_that_a_request_holds_are_not_shown(make_spec: SpecMaker, rows_file: Path) -> None:
    inline = f"data:text/csv;base64,{b64encode(CSV.encode()).decode()}"
    spec = make_spec(train_data=inline)
    assert prepare_job(spec, open_record(spec)).run().checkpoints
    assert not (spec.work_dir / "tables" / "sample_answers.json").exists()


def test_a_flavor_that_cannot_be_written_fails_no_job(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, spec: TrainerSpec
) -> None:
    def broken(folder: Path, **options: Any) -> None:
        (folder / "MLmodel").write_text("half of")
        raise ImportError("no such library")

    monkeypatch.setattr(flavor, "write_flavor", broken)
    tracked = make_spec(tracking=spec.tracking)
    record = open_record(tracked)
    with caplog.at_level(logging.WARNING):
        (checkpoint,) = prepare_job(tracked, record).run().checkpoints
    record.close()
    assert not (Path(checkpoint.path) / "MLmodel").exists()
    assert "MLflow's loader will not know the checkpoint: no such library" in caplog.messages


def test_a_job_that_fails_has_pictures_and_one_that_is_stopped_has_none(
    make_spec: SpecMaker, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    spec = make_spec(work_dir=tmp_path / "stopped")
    cut = prepare_job(spec, open_record(spec), should_stop=lambda: cut.module.optimizer_steps >= 2)
    with pytest.raises(StopRequestedError):
        cut.run()
    assert not drawn
    optimizer = {"optimizer_type": "sgd", "lr": 1e30, "weight_decay": 0.0, "num_warmup_steps": 0}
    spec = make_spec(training={"optimizer_config": optimizer}, work_dir=tmp_path / "diverged")
    with pytest.raises(DivergenceError):
        prepare_job(spec, open_record(spec)).run()
    assert drawn.keys() == OF_ALL
    steps, losses = curve(drawn["loss.png"])
    assert steps[0] == 1
    assert len(losses) < 5


def test_a_state_of_the_release_before_is_gone_on_from(make_spec: SpecMaker) -> None:
    spec = make_spec()
    cut = prepare_job(spec, open_record(spec), should_stop=lambda: cut.module.optimizer_steps >= 2)
    with pytest.raises(StopRequestedError):
        cut.run()
    file = spec.work_dir / RESUME_FILE
    state = torch.load(file, weights_only=True)
    for name in ("epoch_values", "distributions"):
        del state["post_training"][name]
    torch.save(state, file)
    job = prepare_job(spec, open_record(spec))
    assert job.run().checkpoints
    assert job.module.optimizer_steps == 5


@pytest.mark.parametrize("prompts", [[], ["how many?"]])
def test_prompts_of_the_requests_own_are_instead_of_it(make_spec: SpecMaker, prompts: list[str]) -> None:
    spec = make_spec(logger={"sample_prompts": prompts})
    prepare_job(spec, open_record(spec)).run()
    assert not (spec.work_dir / "tables" / "sample_answers.json").exists()
    assert {row[1] for row in read_table(spec.work_dir, "samples.json")} == set(prompts)


def test_what_fails_at_the_end_fails_no_job(
    make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no memory left")

    for name in ("save", "answers_of"):
        monkeypatch.setattr(closing, name, broken)
    spec = make_spec()
    with caplog.at_level(logging.WARNING):
        assert prepare_job(spec, open_record(spec)).run().checkpoints
    said = [record.getMessage() for record in caplog.records]
    assert "the picture loss.png cannot be drawn: no memory left" in said
    assert "the sample questions cannot be answered: no memory left" in said


def test_the_run_in_mlflow_has_it_all(
    make_spec: SpecMaker, client: MlflowClient, run_id: str, server: Any, tmp_path: Path
) -> None:
    tracking = TrackingTarget(tracking_uri=server.uri, run_id=run_id)
    spec = make_spec(training={"n_epochs": 2}, tracking=tracking)
    record = open_record(spec)
    prepare_job(spec, record).run()
    record.close()
    files = {Path(file.path).name for file in client.list_artifacts(run_id, "figures")}
    assert files == OF_ALL
    fetched = Path(client.download_artifacts(run_id, "figures/loss.png", str(tmp_path)))
    assert fetched.read_bytes() == (spec.work_dir / "figures" / "loss.png").read_bytes()
    assert table_of(client, run_id, "sample_answers.json")["question"] == [r["question"] for r in ROWS[:3]]
    description = client.get_run(run_id).data.tags["mlflow.note.content"]
    assert "# job, epoch 1" in description


def test_an_attempt_elsewhere_draws_the_whole_curve(
    spec: TrainerSpec, client: MlflowClient, run_id: str, tmp_path: Path
) -> None:
    first = begun(spec)
    first.log_metrics({"train_loss": 3.0}, step=1)
    first.log_metrics({"train_loss": float("nan")}, step=2)
    first.close()
    assert [step for step, _ in points(client, run_id)] == [1, 2]
    second = begun(retried(spec, work_dir=tmp_path / "elsewhere"))
    second.log_metrics({"train_loss": 1.0}, step=3)
    assert second.history("train_loss") == [(1, 3.0), (3, 1.0)]
    second.close()


def test_margins_go_on_where_a_job_was_cut(make_spec: SpecMaker, tmp_path: Path) -> None:
    changes = {"preference": {"beta": 0.1, "loss_type": "sigmoid"}, "training": {"max_validation_steps": 0}}
    whole = prepare_job(spec := make_spec(work_dir=tmp_path / "whole", **changes), open_record(spec))
    whole.run()
    spec = make_spec(work_dir=tmp_path / "cut", **changes)
    cut = prepare_job(spec, open_record(spec), should_stop=lambda: cut.module.optimizer_steps >= 2)
    with pytest.raises(StopRequestedError):
        cut.run()
    resumed = prepare_job(spec, open_record(spec))
    resumed.run()
    assert torch.equal(
        resumed.module.distributions["rewards/margins"], whole.module.distributions["rewards/margins"]
    )
