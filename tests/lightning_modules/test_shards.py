"""Data sets of several shards: what is made when, what is read back, and what bad rows do."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lightning_modules.data import shards
from lightning_modules.data.content import LazyRows, RawDataset, Row
from lightning_modules.data.formats import instruct_turns
from lightning_modules.data.reading import read_dataset
from lightning_modules.data.shards import TokenizedRows, Tokenizing
from lightning_modules.data.tokenize import Example, Pair
from lightning_modules.job import prepare_job
from lightning_modules.kept import Kept
from lightning_modules.record import open_record
from post_training.errors import DataError
from tests.waiting import wait_until

ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}, {'really ' * (i % 3)}{i}."} for i in range(11)]
BAD = {"question": "alone?"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


@pytest.fixture
def tokenizing(tokenizer: PreTrainedTokenizerBase) -> Tokenizing:
    return Tokenizing(
        tokenizer,
        "sft instruct",
        lambda row: [instruct_turns(row)],
        lambda *e: e[0],
        100,
        len(tokenizer),
        False,
    )


def written(tmp_path: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> RawDataset:
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    return read_dataset(str(tmp_path / name))


def tokenized_rows(
    tmp_path: Path, tokenizing: Tokenizing, rows: Sequence[Any] = ROWS, **options: Any
) -> TokenizedRows:
    return TokenizedRows(written(tmp_path, rows), tokenizing, Kept(tmp_path / "kept", 2**30), **options)


def texts(tokenizer: Any, shard: Sequence[Example]) -> list[str]:
    return [str(tokenizer.decode(shard[i].ids[shard[i].scored_places])) for i in range(len(shard))]


def test_shards_hold_the_rows_in_file_order(tmp_path: Path, tokenizing: Tokenizing) -> None:
    data = tokenized_rows(tmp_path, tokenizing)
    assert (data.counts, data.all_made) == ([4, 4, 3], False)
    found = [text for number in (2, 0, 1) for text in texts(tokenizing.tokenizer, data[number])]
    expected = [f"{row['answer']}<|im_end|>" for row in ROWS]
    assert found == expected[8:] + expected[:8]
    assert data.all_made
    shard = data[0]
    whole = tokenizing.tokenized(data.dataset.rows[:4]).rows
    for index, (example,) in enumerate(whole):
        assert shard[index].ids.tolist() == example.ids.tolist()
        assert shard[index].scored_places.tolist() == example.scored_places.tolist()
    assert shard.lengths == [len(example) for (example,) in whole]
    with pytest.raises(IndexError):
        shard[4]


def test_what_is_kept_is_not_tokenized_again(
    tmp_path: Path, tokenizing: Tokenizing, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tokenized_rows(tmp_path, tokenizing)
    for number in range(3):
        data.make(number)
    monkeypatch.setattr(Tokenizing, "tokenized", None)
    again = tokenized_rows(tmp_path, tokenizing)
    assert texts(tokenizing.tokenizer, again[1]) == texts(tokenizing.tokenizer, data[1])
    again[2]


@pytest.mark.parametrize("left", [0, 100])
def test_a_part_of_a_file_is_made_again(left: int, tmp_path: Path, tokenizing: Tokenizing) -> None:
    file = tokenized_rows(tmp_path, tokenizing).make(1)
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    again = tokenized_rows(tmp_path, tokenizing)
    assert texts(tokenizing.tokenizer, again[1]) == [f"{row['answer']}<|im_end|>" for row in ROWS[4:8]]
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"max_seq_length": 50},
        {"train_on_input": True},
        {"vocab_size": 10**6},
        {"form": "sft dialog"},
    ],
)
def test_every_setting_has_files_of_its_own(tokenizing: Tokenizing, change: dict[str, Any]) -> None:
    other = Tokenizing(**(vars(tokenizing) | change))
    assert other.digest("data") != tokenizing.digest("data")
    assert tokenizing.digest("other") != tokenizing.digest("data")


def test_the_chat_template_has_files_of_its_own(tokenizing: Tokenizing) -> None:
    before = tokenizing.digest("data")
    template = tokenizing.tokenizer.chat_template
    try:
        tokenizing.tokenizer.chat_template = f"{template}{{# another #}}"
        assert tokenizing.digest("data") != before
    finally:
        tokenizing.tokenizer.chat_template = template


def test_bad_rows_are_found_as_their_shard_is_made(tmp_path: Path, tokenizing: Tokenizing) -> None:
    told: list[Any] = []
    data = tokenized_rows(tmp_path, tokenizing, [*ROWS[:9], BAD], tell_of_bad=told.append)
    assert len(data[0]) == 4
    data[1]
    assert told == []
    with pytest.raises(DataError, match=r"1 of 10 rows .*row 10: "):
        data[2]
    ((number, reason),) = told[0].items()
    assert number == 10
    assert "question" in reason


def test_another_process_makes_the_rest_and_bad_rows_are_found(
    tmp_path: Path, tokenizing: Tokenizing
) -> None:
    data = tokenized_rows(tmp_path, tokenizing, [*ROWS[:9], BAD])
    data.make(0)
    assert data.check() is None
    data.make_ahead()
    try:
        wait_until(lambda: len(list(tmp_path.rglob("*.safetensors"))) == 3, 60)
    finally:
        data.close()
    assert not data.all_made
    with pytest.raises(DataError, match="row 10"):
        data.check()
    assert (data.all_made, data.counts) == (True, [4, 4, 1])


def test_a_file_that_changes_meanwhile_ends_the_job(tmp_path: Path, tokenizing: Tokenizing) -> None:
    data = tokenized_rows(tmp_path, tokenizing)
    data.make(0)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n{}")
    with pytest.raises(DataError, match="was changed while it was read"):
        data[1]


class Stuck:
    """A data set whose first row never comes; who waits for it is known."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def read(self, first: int, last: int) -> list[Row]:
        os.write(self._write, f"{os.getpid()}\n".encode())
        signal.pause()
        return []

    def waiting(self) -> psutil.Process:
        return psutil.Process(int(os.read(self._read, 20)))

    def rows(self, folder: Path, tokenizing: Tokenizing) -> TokenizedRows:
        return TokenizedRows(
            RawDataset("stuck", "0", LazyRows(8, self.read)), tokenizing, Kept(folder, 2**30)
        )


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_close_ends_the_process(tmp_path: Path, tokenizing: Tokenizing) -> None:
    stuck = Stuck()
    data = stuck.rows(tmp_path, tokenizing)
    signal.signal(signal.SIGTERM, lambda *received: None)  # as the trainer's, which only takes note
    try:
        data.make_ahead()
        process = stuck.waiting()
        assert process.pid != os.getpid()
        data.close()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert is_gone(process)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends with the shard")
def test_the_process_ends_with_its_trainer(tmp_path: Path, tokenizing: Tokenizing) -> None:
    stuck = Stuck()

    def train() -> None:
        stuck.rows(tmp_path, tokenizing).make_ahead()
        signal.pause()

    trainer = get_context("fork").Process(target=train)
    trainer.start()
    process = stuck.waiting()
    trainer.kill()
    trainer.join()
    wait_until(lambda: is_gone(process), 60)


@pytest.fixture
def pairs(tokenizing: Tokenizing) -> Tokenizing:
    def both(row: Any) -> list[Any]:
        return [instruct_turns(row), instruct_turns({**row, "answer": "No."})]

    return Tokenizing(**(vars(tokenizing) | {"conversations": both, "item": Pair, "form": "pairs"}))


def test_references_come_back_to_their_pairs(tmp_path: Path, pairs: Tokenizing) -> None:
    data = tokenized_rows(tmp_path, pairs)
    data.keep_references("the model")
    shard = data[1]
    sizes = [sum(s.scored for s in shard[i].sequences) for i in range(4)]
    assert data.without_reference(1, [0, 2, 3]) == [0, 2, 3]
    values = torch.arange(sizes[0] + sizes[2], dtype=torch.float32)
    data.set_references(1, [0, 2], values)
    assert data.without_reference(1, [0, 1, 2, 3]) == [1, 3]
    again = tokenized_rows(tmp_path, pairs)
    again.keep_references("the model")
    for one in (data, again):
        found = [one[1][i].reference for i in range(4)]
        assert found[1] is found[3] is None
        assert torch.cat([found[0], found[2]]).tolist() == values.tolist()
    data.set_references(1, [3], torch.ones(sizes[3]))
    assert data.without_reference(1, [0, 1, 2, 3]) == [1]
    again.keep_references("another model")
    assert tokenized_rows(tmp_path, pairs)[1][0].reference is None


def test_references_that_another_process_has_computed_meanwhile_are_seen(
    tmp_path: Path, pairs: Tokenizing
) -> None:
    ours = tokenized_rows(tmp_path, pairs)
    theirs = TokenizedRows(ours.dataset, pairs, ours.kept)
    for data in (ours, theirs):
        data.keep_references("the model")
    size = sum(one.scored for one in ours[0][0].sequences)
    assert ours.without_reference(0, [0]) == [0]
    with theirs.computing_references(0, lambda: False):
        theirs.set_references(0, [0], torch.ones(size))
    with ours.computing_references(0, lambda: False):
        assert ours.without_reference(0, [0]) == []


def test_a_job_of_several_shards_is_the_same_resumed_and_from_what_is_kept(
    make_spec: Any, run: Any, read_metrics: Any, tmp_path: Path
) -> None:
    rows = tmp_path / "many.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    losses = []
    for number in range(2):
        spec = make_spec(
            training={"n_epochs": 2},
            data={"shuffle": True},
            train_data=str(rows),
            work_dir=tmp_path / f"work-{number}",
            cache_dir=tmp_path / "cache",
        )
        run(spec)
        losses.append(read_metrics(spec.work_dir, "train_loss"))
    assert len(losses[0]) == 2 * (2 + 2 + 2)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("change", [{"data": {"packed": True}}, {"runtime": {"max_bad_row_fraction": 0.2}}])
def test_all_rows_are_made_before_training_where_the_steps_depend_on_it(
    change: dict[str, Any], make_spec: Any, tmp_path: Path
) -> None:
    rows = tmp_path / "many.jsonl"
    rows.write_text("\n".join(map(json.dumps, [*ROWS[:9], *([BAD] if "runtime" in change else [])])))
    spec = make_spec(**change, train_data=str(rows))
    job = prepare_job(spec, open_record(spec))
    assert job.data.train_loader.shards.counts == [4, 4, 1]
    assert job.data.train_loader.shards.all_made  # type: ignore[attr-defined]
