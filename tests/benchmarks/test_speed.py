"""The race against other trainers: its talk with them, and a small one of real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import Contender, Process, Race, Runner, races
from tests.mlflow_server import MLflowServer
from tests.tiny_model import write_tiny_model

TALK = """
import sys
print('{"tokens": 7}', flush=True)
for line in sys.stdin:
    assert line == "go\\n"
    print('{"seconds": 1.5}', flush=True)
    break
sys.exit("the end of it")
"""

QUESTIONS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(5)]


def test_a_contender_is_asked_for_rounds_and_its_end_is_told() -> None:
    with Process([sys.executable, "-c", TALK], trainer=False) as process:
        assert process.answer() == {"tokens": 7}
        assert process.round() == {"seconds": 1.5}
        with pytest.raises(RuntimeError, match="the end of it"):
            process.answer()


def test_every_race_has_what_it_is_compared_with() -> None:
    for gpu in (False, True):
        for name, race in races(gpu).items():
            expected = {"full"} if name == "full fine-tuning" else {"TRL default", "TRL best", "ours"}
            assert expected <= set(race.contenders)


@pytest.mark.system
def test_contenders_train_the_same_rows(tmp_path: Path, mlflow_server: MLflowServer) -> None:
    model = write_tiny_model(tmp_path / "model")
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    runner = Runner(model, tmp_path, mlflow_server.uri, rounds=1)
    options: dict[str, Any] = {"dtype": "fp32"}
    race = Race("sft", "qv", 4, 2, {"plain": Contender("plain"), "ours": Contender("ours", options)})
    found = runner.run(race)
    plain, ours = found["plain"], found["ours"]
    assert [len(one["seconds"]) for one in (plain, ours)] == [1, 1]
    assert [list(map(len, one["losses"])) for one in (plain, ours)] == [[2, 2], [2, 2]]
    # the plain loop learns the line break behind an answer too, and computes in bf16
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=0.1)
    assert ours["losses"][1][0] < ours["losses"][0][0]
    assert ours["of_an_epoch"] == ours["median"] == ours["seconds"][0]
    assert 0 < ours["scored"] < ours["computed"] < ours["tokens"], "the beginning that all share stands once"
    assert all(one["peak"] > 2**27 for one in (plain, ours))
