"""A search's study over a real storage, with workers that ask at once and die."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest

from post_training.errors import RecordUnavailableError
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.search import SearchConfig
from post_training.search import NoSearchError, Search, Trial, study_name
from post_training.search_parts import SearchUnavailableError
from tests.requests_of import sft_body

RANK = "algorithm_config.rank"
MODULES = "algorithm_config.lora_attn_modules"
SPACE: dict[str, Any] = {RANK: {"type": "int", "low": 1, "high": 64}}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/searches.db"


def config(**fields: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": SPACE, "n_trials": 4, **fields})


def search(url: str, name: str = "study", epochs: int = 3, **fields: Any) -> Search:
    return Search(url, name, config(**fields), epochs)


def finish(study: Search, trial: Trial, value: float) -> None:
    assert study.complete(trial, value)


def run_worker(url: str, worker: int, sampler: str) -> list[int]:
    """Try until nothing is left; return the numbers of the trials."""
    study = search(url, n_trials=12, max_parallel=4, sampler=sampler).open()
    done = []
    while (trial := study.next_trial(worker)) is not None:
        done.append(trial.number)
        time.sleep(0.02)
        finish(study, trial, float(trial.values[RANK]))
    return done


def test_a_study_is_of_one_request() -> None:
    def name(**changes: Any) -> str:
        return study_name(SupervisedFineTuneRequest.model_validate(sft_body(**changes)))

    assert name() == name()
    assert len({name(), name(training_config__n_epochs=2), name(job_uuid="job-2")}) == 3
    assert len(name(job_uuid="j" * 200)) < 512


def test_trials_have_values_of_the_space_until_none_are_left(url: str) -> None:
    choices = [["q_proj"], ["q_proj", "v_proj"]]
    space = SPACE | {MODULES: {"type": "categorical", "choices": choices}}
    study = search(url, space=space).begin("run-1")
    seen = []
    while (trial := study.next_trial(0)) is not None:
        assert 1 <= trial.values[RANK] <= 64
        assert trial.values[MODULES] in choices
        seen.append(trial.number)
        finish(study, trial, trial.number)
    assert seen == [0, 1, 2, 3]
    assert [trial.state for trial in study.trials()] == ["COMPLETE"] * 4
    assert len(study.study.trials) == 4, "nor is one made that is not to run"


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_workers_in_many_processes_begin_no_more_trials_than_there_may_be(url: str, sampler: str) -> None:
    search(url, n_trials=12, max_parallel=4, sampler=sampler).begin("run-1")
    spawn = multiprocessing.get_context("spawn")
    begin = spawn.Barrier(4)  # else the first may have tried all before the others are there
    with ProcessPoolExecutor(4, mp_context=spawn, initializer=begin.wait) as pool:
        found = list(pool.map(run_worker, [url] * 4, range(4), [sampler] * 4))
    assert sorted(number for numbers in found for number in numbers) == list(range(12))
    assert sum(bool(numbers) for numbers in found) > 1
    study = search(url, n_trials=12).open()
    assert len(study.trials()) == 12
    assert study.next_trial(0) is None


def test_what_has_ended_is_not_tried_again_and_what_was_cut_off_is(url: str) -> None:
    study = search(url).begin("run-1")
    first, second = study.next_trial(0), None
    assert first is not None
    finish(study, first, 1.0)
    second = study.next_trial(0)
    assert second is not None
    study.note(second, mlflow_run_id="run-2", attempts=2)
    study.report(second, 1, 0.5)

    again = search(url).open()
    other = again.next_trial(1)
    taken = again.next_trial(0)
    assert other is not None
    assert taken is not None
    assert (first.number, taken.number, other.number) == (0, 1, 2)
    assert taken.values == second.values
    assert (taken.run_id, taken.attributes["attempts"], taken.reported) == ("run-2", 2, {1})


def test_a_trial_whose_worker_died_as_it_began_is_the_workers_next(url: str) -> None:
    space = SPACE | {"lr": {"type": "float", "low": 0.1, "high": 0.9}}
    study = search(url, space=space).begin("run-1")
    made = study._made_for(1)  # and there the worker dies, or one choice later
    rank = optuna.Trial(study._loaded(), made._trial_id).suggest_int(RANK, 1, 64)
    assert study.next_trial(0).number == 1  # type: ignore[union-attr]
    again = search(url, space=space).open().next_trial(1)
    assert again is not None
    assert (again.number, again.values[RANK]) == (0, rank)
    assert 0.1 <= again.values["lr"] <= 0.9


def test_after_its_time_no_trial_begins_but_one_that_was_begun_ends(url: str) -> None:
    study = search(url, timeout_seconds=100).begin("run-1", lambda: 1000.0)
    trial = study.next_trial(0, lambda: 1099.0)
    assert trial is not None
    assert study.next_trial(0, lambda: 1200.0).number == trial.number  # type: ignore[union-attr]
    finish(study, trial, 1.0)
    assert study.next_trial(0, lambda: 1200.0) is None
    again = search(url, timeout_seconds=100).begin("run-1", lambda: 1010.0)
    assert again.next_trial(0, lambda: 1300.0) is None


def test_the_time_of_a_search_begins_with_its_first_trial(url: str) -> None:
    study = search(url, timeout_seconds=100).begin("run-1", lambda: 1000.0)
    assert not study.spent(lambda: 5000.0)
    trial = study.next_trial(0, lambda: 5000.0)
    assert trial is not None
    study.fail(trial, "no data")
    assert study.next_trial(0, lambda: 5099.0) is not None
    assert not study.spent(lambda: 5100.0)
    study.close("gone")
    assert study.spent(lambda: 5100.0)
    again = search(url, timeout_seconds=100).begin("run-1", lambda: 5100.0)
    assert again.trials() == [], "nothing has succeeded, and there was no time left"
    assert again.next_trial(0, lambda: 5101.0) is not None


def test_a_job_that_begins_anew_has_a_study_of_its_own(url: str) -> None:
    study = search(url).begin("run-1")
    trial = study.next_trial(0)
    assert trial is not None
    finish(study, trial, 1.0)
    assert len(search(url).begin("run-1").trials()) == 1
    other = search(url).begin("run-2")
    assert other.trials() == []
    assert other.id != study.id
    assert search(url).begin("run-2").id == other.id


def test_a_grid_has_each_cell_once_whoever_asks(url: str) -> None:
    space = {
        RANK: {"type": "int", "low": 2, "high": 4, "step": 2},
        "lr": {"type": "float", "low": 0.1, "high": 0.3, "step": 0.1},
        MODULES: {"type": "categorical", "choices": [["q_proj"], ["v_proj"]]},
    }
    search(url, space=space, sampler="grid", n_trials=12).begin("run-1")
    workers = [search(url, space=space, sampler="grid", n_trials=12).open() for _ in range(3)]
    cells = []
    for turn in range(12):
        trial = workers[turn % 3].next_trial(turn % 3)
        assert trial is not None
        cells.append(trial.values)
        finish(workers[turn % 3], trial, 1.0)
    assert all(worker.next_trial(0) is None for worker in workers)
    wanted = [
        {RANK: r, "lr": x, MODULES: m}
        for r in (2, 4)
        for x in (0.1, 0.2, 0.3)
        for m in (["q_proj"], ["v_proj"])
    ]
    assert sorted(cells, key=repr) == sorted(wanted, key=repr)
    assert cells != wanted


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_a_seed_gives_the_same_trials_and_another_others(url: str, sampler: str) -> None:
    def values(name: str, seed: int) -> list[int]:
        found = []
        for _ in range(6):  # each trial by a worker that starts anew
            study = search(url, name, sampler=sampler, n_trials=6, seed=seed).begin("run-1")
            trial = study.next_trial(0)
            assert trial is not None
            found.append(trial.values[RANK])
            finish(study, trial, abs(trial.values[RANK] - 20))
        return found

    first = values("one", 1)
    assert len(set(first)) > 2
    assert values("again", 1) == first
    assert values("other", 2) != first


def test_the_sampler_gp_needs_torch(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_training.search_parts.find_spec", lambda name: None)
    with pytest.raises(SearchUnavailableError, match="needs torch"):
        search(url, sampler="gp")


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_a_trial_that_falls_behind_is_stopped(url: str, pruner: str) -> None:
    study = search(url, epochs=9, pruner=pruner, n_trials=16, direction="maximize").begin("run-1")
    stopped = []
    for number in range(12):
        trial = study.next_trial(0)
        assert trial is not None
        quality = 0.0 if number >= 8 else 1.0 + number
        pruned = any(study.report(trial, epoch, quality) for epoch in range(1, 9))
        if pruned:
            study.prune(trial)
            stopped.append(number)
        else:
            finish(study, trial, quality)
    assert study.best().number == 7  # type: ignore[union-attr]
    if pruner == "none":
        assert stopped == []
    else:
        assert {8, 9, 10, 11} & set(stopped)
    assert [trial.number for trial in study.trials() if trial.state == "PRUNED"] == stopped


def test_a_trial_ends_once_whoever_says_so(url: str) -> None:
    study = search(url).begin("run-1")
    trial = study.next_trial(0)
    assert trial is not None
    finish(study, trial, 1.0)
    finish(study, trial, 2.0)
    study.prune(trial)
    study.fail(trial, "too late")
    assert [(one.state, one.value) for one in study.trials()] == [("COMPLETE", 1.0)]


def test_a_value_is_reported_once(url: str) -> None:
    study = search(url, pruner="median").begin("run-1")
    trial = study.next_trial(0)
    assert trial is not None
    study.report(trial, 1, 2.0)
    taken = search(url, pruner="median").open().next_trial(0)
    assert taken is not None
    assert study.report(taken, 1, 3.0) is False
    assert study.trial(0).value == 2.0


def test_a_decision_whose_answer_was_lost_is_made_again(url: str) -> None:
    study = search(url, pruner="median", n_trials=4).begin("run-1")
    for quality in (1.0, 9.0):
        trial = study.next_trial(0)
        assert trial is not None
        behind = study.report(trial, 1, quality)
        if quality == 1.0:
            finish(study, trial, quality)
    assert behind
    taken = search(url, pruner="median", n_trials=4).open().next_trial(0)
    assert taken is not None
    assert (taken.number, taken.reported) == (1, {1})
    assert study.report(taken, 1, 9.0)


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1), ("maximize", 0)])
def test_the_best_is_of_those_that_finished(url: str, direction: str, best: int) -> None:
    study = search(url, direction=direction, n_trials=5).begin("run-1")
    assert study.best() is None
    for value in (3.0, 1.0):
        trial = study.next_trial(0)
        assert trial is not None
        finish(study, trial, value)
    failed, endless, running = (study.next_trial(worker) for worker in range(3))
    assert failed is not None
    assert endless is not None
    assert running is not None
    study.report(failed, 1, 0.0 if direction == "minimize" else 9.0)
    study.fail(failed, "It failed.")
    assert not study.complete(endless, float("nan"))
    found = study.best()
    assert found is not None
    assert found.number == best
    study.close("Its worker is gone.")
    assert [(trial.state, trial.error) for trial in study.trials()[2:]] == [
        ("FAIL", "It failed."),
        ("FAIL", "Its validation_loss is no finite number."),
        ("FAIL", "Its worker is gone."),
    ]


def test_a_search_of_which_nothing_succeeded_begins_anew(url: str) -> None:
    study = search(url, n_trials=2).begin("run-1")
    before = study.id
    for _ in range(2):
        trial = study.next_trial(0)
        assert trial is not None
        study.fail(trial, "no data")
    again = search(url, n_trials=2).begin("run-1")
    assert again.id != before
    trial = again.next_trial(0)
    assert trial is not None
    finish(again, trial, 1.0)
    kept = search(url, n_trials=2).begin("run-1")
    assert kept.id == again.id
    assert [trial.state for trial in kept.trials()] == ["COMPLETE"]


def test_a_search_that_was_not_begun_is_not_there(url: str) -> None:
    with pytest.raises(NoSearchError):
        search(url).open()


@pytest.mark.parametrize("url", ["nosql://user:secret@host/searches", "no url, secret"])
def test_a_storage_that_there_cannot_be_is_not_waited_for(url: str) -> None:
    with pytest.raises(SearchUnavailableError, match=r"\[post_training\] search_storage") as caught:
        search(url).open()
    assert "secret" not in str(caught.value)


def test_a_storage_that_cannot_be_reached_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(RecordUnavailableError):
        search(f"sqlite:///{tmp_path}/no/such/folder.db").begin("run-1")
