"""Which part each row lies in, what is new, and what of the rows is written."""

from __future__ import annotations

import csv
import json
import random
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lightning_modules.data.content import Row
from lightning_modules.data.reading import read_dataset
from lightning_modules.preparation import CONVERSATIONS, part_of, prepare, question_of, read_rows
from post_training.errors import DataError
from post_training.schemas.preparation import PreparationSource, PreparationSpec, PreparedSource, SplitConfig

SFT, PREFERENCE = "supervised_fine_tune", "preference_optimize"
PARTS = ("train", "validation", "evaluation")
NOTHING_HELD_BACK = {"validation_fraction": 0.0, "evaluation_fraction": 0.0}

Rows = Sequence[Mapping[str, Any]]


def questions(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}."} for i in range(count)]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"What is {i} + {i}?", "chosen": f"It is {2 * i}.", "rejected": "No."}
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=700)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "jsonl": write_jsonl,
    "json": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}


class Night:
    """The data of one night below a folder of its own."""

    def __init__(self, folder: Path, trained: Path | None = None, **split: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.spec = PreparationSpec(
            split=SplitConfig(**split), sources={}, trained=trained and str(trained), work_dir=folder
        )

    def from_champion(self) -> Night:
        """Start training from what was trained before."""
        self.spec.starts_from_trained = True
        return self

    def add(
        self,
        rows: Rows,
        name: str = "rows",
        *,
        kind: str = "jsonl",
        data_format: str = "instruct",
        trained: bool = True,
    ) -> Night:
        """Add a data set in a kind of file."""
        path = self.folder / f"{name}.{kind}"
        WRITERS[kind](path, rows)
        method = PREFERENCE if name == "pairs" else SFT
        self.spec.sources[name] = PreparationSource(
            source=str(path), method=method, data_format=data_format, trained=trained
        )
        return self

    def hold_out(self, rows: Rows, name: str = "rows") -> Night:
        """Compare models on data of one's own."""
        path = self.folder / f"own-{name}.jsonl"
        write_jsonl(path, rows)
        method = PREFERENCE if name == "pairs" else SFT
        self.spec.held_out[name] = PreparationSource(
            source=str(path), method=method, data_format="instruct", trained=False
        )
        return self

    def prepare(self) -> Night:
        """Write the parts."""
        self.found: dict[str, PreparedSource]
        self.found, self.held_out = prepare(self.spec)
        return self

    def lines(self, part: str, name: str = "rows") -> list[dict[str, Any]]:
        """Read the file of a part."""
        file = self.found[name].files[part]  # type: ignore[index]
        text = (self.folder / "data" / file).read_bytes() if file is not None else b""
        return [json.loads(line) for line in text.splitlines()]

    def asked(self, part: str, name: str = "rows", column: str = "question") -> set[str]:
        """Return the questions of a part."""
        return {row[column] for row in self.lines(part, name)}

    @property
    def digests(self) -> Path:
        """The file with what was trained on."""
        return self.folder / "data" / "trained.digests"


def identity(question: str, answer: str) -> bytes:
    """The documented identity of a row without tools, put together by hand."""
    content = f'[{{"content":"{question}","role":"user"}},{{"content":"{answer}","role":"assistant"}}]'
    return sha256(f'{{"conversations":[{content}],"tools":null}}'.encode()).digest()


def asked(question: str) -> bytes:
    """The documented hash of a question."""
    return sha256(b"post_training.split/1\0" + question.encode()).digest()


def place(question: bytes) -> float:
    """The documented place of a question between 0 and 1."""
    return int(sha256(b"post_training.split/1\0" + question).hexdigest()[:16], 16) / 2**64


def split_of(part: str, fraction: float) -> SplitConfig:
    """A split with one part beside the training part."""
    return SplitConfig(**(NOTHING_HELD_BACK | {f"{part}_fraction": fraction}))


@pytest.mark.parametrize("part", ["evaluation", "validation"])
def test_the_question_decides_by_the_documented_rule(part: str) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What is\n\t2 +  2?\u2003"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "6"},
    ]
    at = place(b"What is 2 + 2?")
    border = at if part == "evaluation" else 1 - at
    assert part_of(question_of(conversation, bytes(32)), split_of(part, border + 1e-9)) == part
    assert part_of(question_of(conversation, bytes(32)), split_of(part, border - 1e-9)) == "train"


def test_a_row_that_asks_nothing_is_placed_by_its_identity() -> None:
    conversation = [{"role": "assistant", "content": "Hello"}]
    own = sha256(b"own").digest()
    assert part_of(question_of(conversation, own), split_of("evaluation", place(own) + 1e-9)) == "evaluation"
    assert part_of(question_of(conversation, own), split_of("evaluation", place(own) - 1e-9)) == "train"


def test_an_identity_is_of_what_is_trained_on(tmp_path: Path) -> None:
    columns = {"id": 7, "seen": "2026-11-28"}
    row, pair = {"question": "Why?", "answer": "So."}, {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    night = Night(tmp_path, **NOTHING_HELD_BACK).add([row | columns]).add([pair | columns], "pairs").prepare()
    both = "],[".join(
        f'{{"content":"Why?","role":"user"}},{{"content":"{answer}","role":"assistant"}}'
        for answer in ("So.", "No.")
    )
    of_pair = sha256(f'{{"conversations":[[{both}]],"tools":null}}'.encode()).digest()
    taught = [identity("Why?", "So.")[:16], of_pair[:16], asked("Why?")[:16]]
    assert night.digests.read_bytes() == b"".join(sorted(taught))


def test_tools_are_trained_on_too(tmp_path: Path) -> None:
    dialog = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    tools = [None, "[]", [{"name": "look"}], '[{"name": "look"}]', [{"name": "see"}]]
    rows = [{"messages": dialog, "tools": some} for some in tools]
    night = Night(tmp_path, **NOTHING_HELD_BACK).add(rows, data_format="dialog").prepare()
    assert len(night.digests.read_bytes()) == (3 + 1) * 16  # three rows that ask the same
    assert identity("Why?", "So.")[:16] in night.digests.read_bytes()


def test_parts_have_their_shares(tmp_path: Path) -> None:
    found = Night(tmp_path).add(questions(4000)).prepare().found["rows"]
    assert sum(found.rows.values()) == 4000
    for part, share in {"evaluation": 0.1, "validation": 0.05, "train": 0.85}.items():
        deviation = (4000 * share * (1 - share)) ** 0.5
        assert abs(found.rows[part] - 4000 * share) < 3 * deviation  # type: ignore[index]


@pytest.mark.parametrize("kind", WRITERS)
def test_neither_order_nor_file_nor_other_columns_matter(kind: str, tmp_path: Path) -> None:
    rows = questions(1500)
    first = Night(tmp_path / "first").add(rows).prepare()
    changed = [row | {"id": i, "note": "x" * (i % 3)} for i, row in enumerate(rows)]
    random.Random(3).shuffle(changed)
    second = Night(tmp_path / "second").add(changed, kind=kind).prepare()
    assert second.found["rows"] == first.found["rows"]
    assert second.digests.read_bytes() == first.digests.read_bytes()
    for part in PARTS:
        assert second.asked(part) == first.asked(part) != set()


@pytest.mark.parametrize("change", ["an answer", "a row less", "a row twice", "a fraction"])
def test_other_data_or_parts_have_another_digest(change: str, tmp_path: Path) -> None:
    rows = questions(300)
    others = {
        "an answer": [rows[0] | {"answer": "Unknown."}, *rows[1:]],
        "a row less": rows[1:],
        "a row twice": [rows[0], *rows],
    }
    split = {"evaluation_fraction": 0.5} if change == "a fraction" else {}
    first = Night(tmp_path / "first").add(rows).prepare()
    second = Night(tmp_path / "second", **split).add(others.get(change, rows)).prepare()
    assert second.found["rows"].digest != first.found["rows"].digest


def test_the_same_rows_in_another_part_have_another_digest(tmp_path: Path) -> None:
    first = Night(tmp_path / "first", **NOTHING_HELD_BACK).add(questions(3)).prepare().found["rows"]
    held_back = {"evaluation_fraction": 1 - 1e-9, "validation_fraction": 0.0}
    second = Night(tmp_path / "second", **held_back).add(questions(3)).prepare().found["rows"]
    assert first.rows["train"] == second.rows["evaluation"] == 3
    assert first.digest != second.digest


def test_a_question_lies_in_one_part_of_both_data_sets(tmp_path: Path) -> None:
    night = Night(tmp_path, evaluation_fraction=0.3, validation_fraction=0.3)
    night.add(questions(300)).add(pairs(300), "pairs").prepare()
    for part in PARTS:
        assert night.asked(part) == night.asked(part, "pairs", "prompt") != set()


def test_a_new_answer_stays_with_its_question(tmp_path: Path) -> None:
    rows = questions(300)
    night = Night(tmp_path).add([*rows, *(row | {"answer": "Other.", "id": 1} for row in rows)]).prepare()
    assert not night.asked("train") & night.asked("evaluation")
    assert not night.asked("train") & night.asked("validation")
    assert sum(night.found["rows"].rows.values()) == 600


def test_a_changed_fraction_moves_the_fewest_rows(tmp_path: Path) -> None:
    rows = questions(1000)
    small, large, other = (
        Night(tmp_path / name, **split).add(rows).prepare()
        for name, split in {
            "small": {"evaluation_fraction": 0.1, "validation_fraction": 0.1},
            "large": {"evaluation_fraction": 0.3, "validation_fraction": 0.1},
            "other": {"evaluation_fraction": 0.1, "validation_fraction": 0.2},
        }.items()
    )
    assert small.asked("evaluation") < large.asked("evaluation")
    assert small.asked("validation") == large.asked("validation")
    assert small.asked("validation") < other.asked("validation")
    assert small.asked("evaluation") == other.asked("evaluation")


def test_digests_grow_from_night_to_night_and_new_rows_are_told_apart(tmp_path: Path) -> None:
    rows = questions(2500)
    first = Night(tmp_path / "first", rows="new").add(rows[:2000]).prepare()
    trained = first.lines("train")
    expected = {identity(row["question"], row["answer"])[:16] for row in trained}
    expected |= {asked(row["question"])[:16] for row in trained}
    assert any(digest.endswith(b"\0") for digest in expected)  # which numpy would cut
    assert first.digests.read_bytes() == b"".join(sorted(expected))
    assert first.found["rows"].new_rows == first.found["rows"].rows["train"] == len(trained)

    tonight = rows[1000:]
    new = Night(tmp_path / "new", first.digests, rows="new").add(tonight).add(pairs(400), "pairs").prepare()
    every = Night(tmp_path / "all", first.digests).add(tonight).add(pairs(400), "pairs").prepare()
    added = [row for row in every.lines("train") if row not in trained]
    assert new.lines("train") == added
    assert {row["question"] for row in added} <= {row["question"] for row in rows[2000:]}
    assert new.found["rows"].new_rows == every.found["rows"].new_rows == len(added) > 0
    assert every.found["rows"].rows["train"] > len(added)
    assert new.lines("train", "pairs") == every.lines("train", "pairs") != []
    for part in ("validation", "evaluation"):
        assert new.lines(part) == every.lines(part) != []
    assert new.found["rows"].digest == every.found["rows"].digest
    assert new.digests.read_bytes() == every.digests.read_bytes()
    digests = new.digests.read_bytes()
    assert len(digests) == 16 * (2 * len(trained) + 2 * len(added) + len(new.lines("train", "pairs")))
    assert expected < {digests[at : at + 16] for at in range(0, len(digests), 16)}


def test_a_share_that_grows_takes_in_only_questions_that_no_training_has_seen(tmp_path: Path) -> None:
    rows = questions(1000)
    first = Night(tmp_path / "first").add(rows[:600]).prepare()
    assert first.found["rows"].kept == {}
    larger = {"evaluation_fraction": 0.5}
    same = Night(tmp_path / "same", first.digests, **larger).add(rows[:600]).prepare()
    assert same.asked("evaluation") == first.asked("evaluation")
    assert same.asked("train") == first.asked("train")
    moved = Night(tmp_path / "moved", **larger).add(rows[:600]).prepare()
    moved_rows = moved.found["rows"].rows["evaluation"] - first.found["rows"].rows["evaluation"]
    assert same.found["rows"].kept == {"evaluation": moved_rows}
    assert moved_rows > 0
    more = Night(tmp_path / "more", same.digests, **larger).add(rows).prepare()
    fresh = Night(tmp_path / "fresh", **larger).add(rows[600:]).prepare()
    assert more.asked("evaluation") == first.asked("evaluation") | fresh.asked("evaluation")
    assert not more.asked("evaluation") & first.asked("train")
    assert more.found["rows"].kept == same.found["rows"].kept


def test_another_answer_or_a_pair_asks_what_was_trained_on_too(tmp_path: Path) -> None:
    first = Night(tmp_path / "first", **NOTHING_HELD_BACK).add(questions(200)).prepare()
    split = {"evaluation_fraction": 0.5, "validation_fraction": 0.0, "rows": "new"}
    night = Night(tmp_path / "second", first.digests, **split)
    night.add([row | {"answer": "Other."} for row in questions(300)])
    night.add(pairs(300), "pairs", trained=False).prepare()
    old, new = ({row["question"] for row in some} for some in (questions(200), questions(300)[200:]))
    for name, column in (("rows", "question"), ("pairs", "prompt")):
        assert night.asked("evaluation", name, column) < new
        assert night.asked("evaluation", name, column)
        assert old < night.asked("train", name, column)
        assert night.found[name].kept["evaluation"] > 0


@pytest.mark.parametrize("from_champion", [True, False])
def test_what_the_start_was_trained_on_is_not_validated_on(tmp_path: Path, from_champion: bool) -> None:
    rows = questions(300)
    first = Night(tmp_path / "first").add(rows).prepare()
    night = Night(tmp_path / "second", first.digests, validation_fraction=0.4).add(rows)
    if from_champion:
        night.from_champion()
    found = night.prepare().found["rows"]
    assert (night.asked("validation") == first.asked("validation")) is from_champion
    assert (found.kept.get("validation", 0) > 0) is from_champion
    assert sum(found.rows.values()) == 300


def test_what_the_champions_before_were_trained_on_is_remembered(tmp_path: Path) -> None:
    rows = questions(300)
    digests = None
    for number in range(3):  # each night has rows of its own, and loses those of the nights before
        night = Night(tmp_path / str(number), digests, **NOTHING_HELD_BACK)
        digests = night.add(rows[100 * number : 100 * (number + 1)]).prepare().digests
    last = Night(tmp_path / "last", digests, evaluation_fraction=0.9).add(rows).prepare()
    assert last.found["rows"].rows["evaluation"] == 0
    assert last.found["rows"].files["evaluation"] is None
    unknown = Night(tmp_path / "unknown", evaluation_fraction=0.9).add(rows).prepare()
    assert last.found["rows"].kept == {"evaluation": unknown.found["rows"].rows["evaluation"]}


def test_own_data_that_asks_what_was_trained_on_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Night(tmp_path / "first", **NOTHING_HELD_BACK).add(questions(30)).prepare()
    night = Night(tmp_path / "second", first.digests, evaluation_fraction=0.0).add(questions(100))
    own = [row | {"answer": "Other."} for row in questions(40)]
    held_out = night.hold_out(own).prepare().held_out["rows"]
    assert (held_out.rows, held_out.trained) == (40, 30)
    assert f"30 of 40 rows of {tmp_path}/second/own-rows.jsonl ask what was trained on before" in caplog.text
    assert not night.asked("train") & {row["question"] for row in own}


def test_a_part_that_the_stages_could_not_read_is_refused(tmp_path: Path) -> None:
    """A file on this machine has no limit, and parquet unpacks: what is prepared may be larger."""
    rows = questions(40)
    night = Night(tmp_path, **NOTHING_HELD_BACK).add(rows, kind="parquet").prepare()
    size = (tmp_path / "data" / "rows.train.jsonl").stat().st_size
    night.spec.max_data_bytes = size
    assert night.prepare().lines("train") == rows
    night.spec.max_data_bytes = size - 1
    with pytest.raises(
        DataError, match=rf"rows\.train\.jsonl would have more than the {size - 1} bytes of .* max_data_bytes"
    ):
        night.prepare()


def test_digests_that_the_next_night_could_not_read_are_refused(tmp_path: Path) -> None:
    before = tmp_path / "digests"
    before.write_bytes(b"".join(number.to_bytes(16, "big") for number in range(100)))
    night = Night(tmp_path / "night", before, **NOTHING_HELD_BACK).add(questions(1))
    night.spec.max_data_bytes = 102 * 16
    assert len(night.prepare().digests.read_bytes()) == 102 * 16
    night.spec.max_data_bytes -= 1
    with pytest.raises(DataError, match=r"trained\.digests would have more than the 1631 bytes"):
        night.prepare()


def test_what_no_stage_trains_on_is_not_recorded_as_trained(tmp_path: Path) -> None:
    night = Night(tmp_path).add(questions(300)).add(pairs(300), "pairs", trained=False).prepare()
    assert len(night.digests.read_bytes()) == 2 * 16 * night.found["rows"].rows["train"]
    assert night.found["pairs"].rows["train"] > 0


@pytest.mark.parametrize("name", ["rows", "pairs"])
def test_what_models_are_compared_on_is_not_trained_on(tmp_path: Path, name: str) -> None:
    """Whatever the answer in the own data: the question is what must be new to the model."""
    own = [row | {"answer": "Another."} for row in questions(40)] if name == "rows" else pairs(40)
    night = Night(tmp_path, evaluation_fraction=0.0).add(questions(100)).add(pairs(100), "pairs")
    night.hold_out(own, name).prepare()
    kept = {row["question"] for row in questions(100)[40:]}
    for source, column in (("rows", "question"), ("pairs", "prompt")):
        found = night.found[source]
        assert night.asked("train", source, column) | night.asked("validation", source, column) == kept
        assert (found.held_out, found.rows["train"] + found.rows["validation"]) == (40, 60)
    taught = [*night.lines("train"), *night.lines("train", "pairs"), *night.asked("train")]
    assert len(night.digests.read_bytes()) == 16 * len(taught)
    other = Night(tmp_path / "other", evaluation_fraction=0.0).add(questions(100)).hold_out(own[:39], name)
    assert other.prepare().held_out.keys() == night.held_out.keys() == {name}
    assert other.held_out != night.held_out


def test_a_night_without_anything_new_has_no_training_file(tmp_path: Path) -> None:
    first = Night(tmp_path / "first").add(questions(300)).prepare()
    night = Night(tmp_path / "second", rows="new", trained=first.digests).add(questions(300)).prepare()
    found = night.found["rows"]
    assert (found.rows["train"], found.files["train"], found.new_rows) == (0, None, 0)
    assert found.rows["evaluation"] == first.found["rows"].rows["evaluation"] > 0
    assert night.digests.read_bytes() == first.digests.read_bytes()
    names = {file.name for file in (night.folder / "data").iterdir()}
    assert names == {"rows.validation.jsonl", "rows.evaluation.jsonl", "trained.digests"}


def test_duplicates_stay_and_are_new_together(tmp_path: Path) -> None:
    rows = questions(2)
    night = (
        Night(tmp_path / "first", rows="new", **NOTHING_HELD_BACK).add([rows[0], rows[1], rows[0]]).prepare()
    )
    assert night.lines("train") == [rows[0], rows[1], rows[0]]
    assert night.found["rows"].new_rows == 3
    assert len(night.digests.read_bytes()) == 2 * 2 * 16


def test_an_attempt_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    Night(tmp_path).add(questions(300)).add(pairs(300), "pairs").prepare()
    night = Night(tmp_path, **NOTHING_HELD_BACK).add(questions(10)).prepare()
    assert night.lines("train") == questions(10)
    assert {file.name for file in (tmp_path / "data").iterdir()} == {"rows.train.jsonl", "trained.digests"}


MESSAGES = [
    {"role": "user", "content": "Où est\u2028la gare\u00a0? 🚉", "name": None},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "look", "arguments": '{"a": null}'}}],
    },
    {"role": "tool", "content": "", "tool_calls": None},
    {"role": "assistant", "content": "Là.\nTout droit."},
]
SAMPLES: dict[tuple[str, str], list[dict[str, Any]]] = {
    (SFT, "instruct"): [
        {"question": " «Où»\r\n\u2028? ", "answer": '"Là",\tné\\', "id": 7, "score": 0.1, "none": None},
        {"question": "2?", "answer": "2!", "id": 8, "score": 0.2, "none": None},
    ],
    (SFT, "dialog"): [
        {"dialog": json.dumps(MESSAGES), "id": 1},
        {"dialog": json.dumps(MESSAGES[::3]), "id": 2},
    ],
    (PREFERENCE, "instruct"): [{"prompt": "Où ?", "chosen": "Là.", "rejected": "Ici.", "id": 5}],
    (PREFERENCE, "dialog"): [
        {
            "prompt": json.dumps(MESSAGES[0]),
            "chosen": json.dumps(MESSAGES[3]),
            "rejected": json.dumps({"role": "assistant", "content": "Ici."}),
        }
    ],
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("method", "data_format"), SAMPLES)
def test_what_is_written_is_read_as_the_trainer_reads_the_source(
    method: str, data_format: str, kind: str, tmp_path: Path
) -> None:
    from lightning_modules.registry import METHODS

    read = METHODS[method].conversations[data_format]
    rows = SAMPLES[method, data_format]
    name = "pairs" if method == PREFERENCE else "rows"
    night = Night(tmp_path, **NOTHING_HELD_BACK).add(rows, name, kind=kind, data_format=data_format).prepare()
    source = read_dataset(night.spec.sources[name].source)
    written = read_dataset(str(tmp_path / "data" / f"{name}.train.jsonl"))
    expected = [read(row.value) for row in source.rows]
    assert [read(row.value) for row in written.rows] == expected
    assert len(expected) == len(rows)
    assert [CONVERSATIONS[method](data_format, row.value) for row in source.rows] == expected


def test_nested_messages_of_parquet_are_written(tmp_path: Path) -> None:
    from lightning_modules.registry import METHODS

    rows = [{"messages": MESSAGES, "at": datetime(2026, 11, 28, 18), "raw": b"\xff"}]
    night = Night(tmp_path, **NOTHING_HELD_BACK).add(rows, kind="parquet", data_format="dialog").prepare()
    [line] = night.lines("train")
    assert line["at"] == "2026-11-28 18:00:00"
    read = METHODS[SFT].conversations["dialog"]
    [source] = read_dataset(night.spec.sources["rows"].source).rows
    assert read(line) == read(source.value)


def test_cells_stay_as_they_are_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"question": "é?", "answer": "ü", "id": 7, "tags": {"a": [1, None]}},
        {"question": "2?", "answer": "2", "id": "half \ud800"},
        {"question": "3?", "answer": "3", "tags": {}},
    ]
    night = Night(tmp_path, **NOTHING_HELD_BACK).add([row | {"none": None} for row in rows]).prepare()
    assert night.lines("train") == rows
    first = (tmp_path / "data" / "rows.train.jsonl").read_bytes().splitlines()[0]
    assert first.decode() == '{"question": "é?", "answer": "ü", "id": 7, "tags": {"a": [1, null]}}'


def test_bad_rows_are_refused_with_their_reasons(tmp_path: Path) -> None:
    rows = [*questions(1), {"question": "?"}, *questions(1), {"question": 3, "answer": "x"}]
    reasons = r"2 of 4 rows of .*rows\.jsonl are bad and data\.max_bad_row_fraction is 0: row 2: .*; row 4: "
    with pytest.raises(DataError, match=reasons):
        Night(tmp_path).add(rows).prepare()
    with pytest.raises(DataError, match=r"data\.max_bad_row_fraction is 0\.49"):
        Night(tmp_path, max_bad_row_fraction=0.49).add(rows).prepare()
    night = Night(tmp_path, max_bad_row_fraction=0.5, **NOTHING_HELD_BACK).add(rows).prepare()
    assert night.lines("train") == questions(1) * 2
    assert night.found["rows"].skipped == 2


def test_a_line_that_is_no_row_says_so(tmp_path: Path) -> None:
    night = Night(tmp_path).add(questions(2))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n{")
    with pytest.raises(DataError, match="row 3: not JSON: "):
        night.prepare()


def test_bad_rows_of_all_blocks_are_counted(tmp_path: Path) -> None:
    rows = [{"question": "?"} if i % 500 == 0 else row for i, row in enumerate(questions(2500))]
    assert Night(tmp_path, max_bad_row_fraction=0.002).add(rows).prepare().found["rows"].skipped == 5
    with pytest.raises(DataError, match="row 2001"):
        Night(tmp_path, max_bad_row_fraction=0.0019).add(rows).prepare()


def test_a_source_without_a_usable_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 2 rows of .*pairs\.jsonl are bad"):
        Night(tmp_path, max_bad_row_fraction=0.99).add(questions(2)).add([{}, {}], "pairs").prepare()
    with pytest.raises(DataError, match=r"rows\.jsonl holds no rows"):
        Night(tmp_path).add([]).prepare()


@pytest.mark.parametrize("column", ["deep", "tools"])
def test_no_depth_of_nesting_ends_the_process(column: str) -> None:
    source = PreparationSource(source="/rows.jsonl", method=SFT, data_format="instruct")
    nested: Any = "x"
    rows = []
    for number in range(1, 2000):
        nested = {"x": nested}
        cell = [nested] if column == "tools" else nested
        rows.append(Row(number, {"question": "?", "answer": "!", column: cell}))
    usable, bad = read_rows(rows, source, SplitConfig())
    assert len(usable) + len(bad) == len(rows)
    assert 1 not in bad
    assert set(bad.values()) <= {"is nested too deeply"}


def test_digests_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "digests").write_bytes(bytes(33))
    with pytest.raises(
        DataError, match=r"/digests of what was trained on before must have 16 .* got 33 bytes"
    ):
        Night(tmp_path, tmp_path / "digests").add(questions(1)).prepare()
    with pytest.raises(
        DataError, match=r"cannot read the digests .*/gone of .*: the data set .* does not exist"
    ):
        Night(tmp_path, tmp_path / "gone").add(questions(1)).prepare()


def test_digests_may_lie_under_the_roots_alone(tmp_path: Path) -> None:
    night = Night(tmp_path / "own", tmp_path / "digests").add(questions(1))
    (tmp_path / "digests").write_bytes(bytes(32))
    night.spec.model_roots = (tmp_path / "own",)
    with pytest.raises(DataError, match="under no folder of allowed_roots"):
        night.prepare()
    night.spec.model_roots = (tmp_path,)
    assert len(night.prepare().digests.read_bytes()) == 16 * (1 + 2 * night.found["rows"].rows["train"])


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rows = [{"question": f"{i}?", "answer": "x" * 2000} for i in range(count)]
        night = Night(tmp_path / str(count)).add(rows)
        del rows
        tracemalloc.start()
        night.prepare()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1000)  # what is imported and cached once
    assert peak(6000) - peak(2000) < 1e6  # of 8 MB more


def test_all_formats_of_all_methods_are_read() -> None:
    from lightning_modules.registry import METHODS

    assert set(SAMPLES) == set(product(CONVERSATIONS, ("instruct", "dialog")))
    assert CONVERSATIONS.keys() == METHODS.keys()
