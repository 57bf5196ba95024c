"""The tasks of a search: what they try, what they stop, what they go on with, and what the job gets of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from post_training.operators.search import search_before
from post_training.operators.training import SupervisedFineTuneOperator
from post_training.record import new_run
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.search import Search
from tests.mlflow_server import MLflowServer
from tests.operators.conftest import connect
from tests.operators.searches import DAG_ID, RANK, SearchWorkplace
from tests.operators.workplace import attempt_id
from tests.waiting import wait_until


@pytest.fixture
def searches(tmp_path: Path, mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch) -> SearchWorkplace:
    return SearchWorkplace(tmp_path, mlflow_server, monkeypatch)


def test_the_plan_begins_the_jobs_run_and_says_how_many_workers_there_are(searches: SearchWorkplace) -> None:
    body = searches.body("plan-1", {"max_parallel": 2})
    assert searches.plan(body) == [0, 1]
    assert searches.plan(searches.body("plan-2", {"max_parallel": 8})) == [0, 1, 2]
    run = searches.job_run(body)
    assert run.info.status == "RUNNING"
    assert run.data.tags["airflow.task_id"] == "train"
    assert RANK not in run.data.params, "what is searched is written when it is known"
    assert run.data.params["algorithm_config.alpha"] == "8"


def test_the_plan_goes_on_in_the_run_that_was_made_at_submit(searches: SearchWorkplace) -> None:
    from post_training.job_ids import TaskKey

    body = searches.body("plan-3")
    request = SupervisedFineTuneRequest.model_validate(body)
    made = searches.tracking.create_run(**new_run(request, TaskKey(DAG_ID, "plan-3", "train")))
    searches.plan(body, conf={"mlflow_run_id": made.run_id})
    run = searches.job_run(body)
    assert (run.info.run_id, run.info.status) == (made.run_id, "RUNNING")


@pytest.mark.parametrize(
    ("search", "changes", "sentence"),
    [
        ({"metric": "accuracy"}, {}, r"hyperparam_search_config\.metric: Input should be"),
        ({}, {"hyperparam_search_config": {}}, r"must hold a search here, got \{\}; the DAG 'supervised"),
        ({}, {"training_config__data_config__dataset_id": "gone.jsonl"}, r"dataset_id: no such file"),
    ],
)
def test_a_plan_that_is_refused_is_told_in_the_jobs_run(
    searches: SearchWorkplace, search: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    body = searches.body(f"refused-{len(sentence)}", search, **changes)
    with pytest.raises(AirflowFailException, match=sentence) as caught:
        searches.plan(body)
    run = searches.job_run(body)
    assert (run.info.status, run.data.tags["post_training.error"]) == ("FAILED", str(caught.value))


def test_a_job_that_may_search_and_is_not_asked_to_trains_once(searches: SearchWorkplace) -> None:
    body = searches.body("plain-1", hyperparam_search_config={})
    assert searches.plan(body, required=False) == [0]
    assert searches.run_trials(body) == []
    searches.trains("finish(metrics={'train_loss': 0.5})")
    assert searches.train(body)["metrics"] == {"train_loss": 0.5}


def test_a_job_is_below_the_run_that_it_is_part_of(searches: SearchWorkplace) -> None:
    body = searches.body("below-1")
    searches.plan(body, parent="a1" * 16)
    assert searches.job_run(body).data.tags["mlflow.parentRunId"] == "a1" * 16


def test_what_was_there_when_the_request_was_accepted_may_come_back(searches: SearchWorkplace) -> None:
    body = searches.body("back-1", training_config__data_config__dataset_id="gone.jsonl")
    with pytest.raises(AirflowException, match="no such file") as caught:
        searches.plan(body, conf={"mlflow_run_id": "a1" * 16})
    assert not isinstance(caught.value, AirflowFailException)


def test_each_trial_is_a_run_below_the_jobs(searches: SearchWorkplace) -> None:
    body = searches.body("trials-1", logger_config={"run_name": "ranks", "tags": {"team": "a"}})
    searches.plan(body)
    operator = searches.trials(body)
    assert operator.execute(searches.at("trials", body, map_index=0)) == [0, 1, 2]
    assert str(operator.mlflow_run_url).endswith(searches.job_run(body).info.run_id)
    assert searches.pushed["_link_MLflowRunLink"] == operator.mlflow_run_url
    assert searches.pushed["_link_JobLink"].endswith("?job_uuid=trials-1")
    runs = searches.trial_runs(body)
    assert sorted(run.data.params[RANK] for run in runs) == ["2", "4", "8"]
    for number, run in enumerate(runs):
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"ranks trial {number}"
        tags = run.data.tags
        assert (tags["post_training.trial_state"], tags["team"]) == ("complete", "a")
        assert "post_training.job_uuid" not in tags, "it is no job"
        assert "post_training.method" not in tags
    study = searches.study(body)
    assert {trial.values[RANK]: trial.value for trial in study.trials()} == {2: 2.0, 4: 4.0, 8: 8.0}
    assert not list((searches.home / "jobs" / DAG_ID / "trials-1" / "trials.0").glob("trial-*/"))
    assert searches.run_trials(body, attempt=2) == [], "what has ended is not trained again"


def test_what_a_trainer_is_told_is_a_request_of_the_trials_values(
    searches: SearchWorkplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = {
        "launcher": "ray",
        "num_nodes": 2,
        "seed": 7,
    }  # trials train on their worker all the same
    connect(monkeypatch, host="http://airflow/post-training", extra={"runtime": defaults})
    kept = searches.data.parent / "specs"
    kept.mkdir()
    searches.trains(
        f"Path({str(kept)!r}, str(rank)).write_text(json.dumps(spec))\n"
        "finish(metrics={'validation_loss': 1.0})"
    )
    body = searches.body(
        "spec-1",
        {"use": "retrain"},
        checkpoint_dir=str(searches.data / "copies"),
        logger_config={"log_model": False},
    )
    searches.plan(body)
    searches.run_trials(body)
    specs = {int(file.name): json.loads(file.read_text()) for file in kept.iterdir()}
    assert set(specs) == {2, 4, 8}
    for spec in specs.values():
        assert spec["request"]["hyperparam_search_config"] == {}
        runtime = spec["request"]["runtime"]
        assert [runtime[name] for name in ("launcher", "num_nodes", "seed")] == ["local", 1, 7]
        assert spec["request"]["checkpoint_dir"] is spec["checkpoint_dir"] is None
        assert spec["request"]["logger_config"] == {"log_model": True}
    assert len({spec["cache_dir"] for spec in specs.values()}) == 1, "trials share what they make once"
    assert len({spec["work_dir"] for spec in specs.values()}) == 3
    assert len({spec["tracking"]["run_id"] for spec in specs.values()}) == 3


def test_a_trial_that_falls_behind_is_stopped(searches: SearchWorkplace) -> None:
    space = {RANK: {"type": "int", "low": 1, "high": 64}}
    searches.trains(
        f"marker = Path({str(searches.data)!r}, 'second'); first = not marker.exists(); marker.touch()\n"
        "measure(1, 1.0 if first else 50.0)\n"
        "if first:\n"
        "    measure(2, 1.0); measure(3, 1.0); finish(metrics={'validation_loss': 1.0}); sys.exit()\n"
        "import time\n"
        "for _ in range(600): print('working'); time.sleep(0.1)"
    )
    body = searches.body(
        "prune-1",
        {"space": space, "sampler": "random", "pruner": "median", "n_trials": 2},
        training_config__n_epochs=3,
    )
    searches.plan(body)
    assert searches.run_trials(body) == [0, 1]
    assert [(trial.state, trial.value) for trial in searches.study(body).trials()] == [
        ("COMPLETE", 1.0),
        ("PRUNED", 50.0),
    ]
    runs = searches.trial_runs(body)
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED"]
    assert runs[1].data.tags["post_training.trial_state"] == "pruned"


def test_a_trial_that_fails_does_not_end_the_search(searches: SearchWorkplace) -> None:
    searches.trains(
        "if rank == 8: finish(status='failed', error='Too large.', permanent=True); sys.exit(1)\n"
        "if rank == 4: finish(metrics={'validation_loss': float('nan')}); sys.exit()\n"
        "finish(metrics={'validation_loss': 2.0})"
    )
    body = searches.body("fails-1")
    searches.plan(body)
    assert searches.run_trials(body) == [0, 1, 2]
    states = {trial.values[RANK]: (trial.state, trial.error) for trial in searches.study(body).trials()}
    assert states == {
        2: ("COMPLETE", None),
        4: ("FAIL", "Its validation_loss is no finite number."),
        8: ("FAIL", "Too large."),
    }
    errors = {
        run.data.params[RANK]: (run.info.status, run.data.tags.get("post_training.error"))
        for run in searches.trial_runs(body)
    }
    assert errors["2"] == ("FINISHED", None)
    assert errors["4"] == ("FAILED", "Its validation_loss is no finite number.")
    assert errors["8"] == ("FAILED", "Too large.")


def test_a_trainer_that_dies_is_started_again_a_few_times(searches: SearchWorkplace) -> None:
    count = searches.data / "count"
    searches.trains(
        f"count = Path({str(count)!r} + str(rank)); n = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (n + 1))\n"
        "if rank == 2 and n == 1: finish(metrics={'validation_loss': 1.0})\n"
        "else: os.kill(os.getpid(), 9)"
    )
    body = searches.body(
        "dies-1", {"n_trials": 2, "space": {RANK: {"type": "categorical", "choices": [2, 4]}}}
    )
    searches.plan(body)
    searches.run_trials(body)
    states = {trial.values[RANK]: trial for trial in searches.study(body).trials()}
    assert states[2].state == "COMPLETE"
    assert (states[4].state, len(Path(f"{count}4").read_text())) == ("FAIL", 3)
    assert "killed by signal 9" in str(states[4].error)


def test_a_task_that_is_stopped_leaves_its_trial_to_the_next_attempt(searches: SearchWorkplace) -> None:
    sign, begun = searches.data / "sign", searches.data / "begun"
    searches.trains(
        f"with Path({str(begun)!r}).open('a') as out: out.write(f'{{rank}} ')\n"
        f"sign = Path({str(sign)!r})\n"
        "import time\n"
        "if len(Path(sign.parent, 'begun').read_text().split()) == 2:\n"
        "    (folder / 'state').write_text('half'); sign.touch()\n"
        "    for _ in range(600): print('working'); time.sleep(0.1)\n"
        "finish(metrics={'validation_loss': float(rank), 'state': float((folder / 'state').exists())})"
    )
    body = searches.body("stopped-1")
    searches.plan(body)
    operator = searches.trials(body)
    killer = searches.stops(operator, sign)
    with pytest.raises(AirflowException, match="stopped"):
        operator.execute(searches.at("trials", body, map_index=0))
    killer.join()
    before = searches.trial_runs(body)
    assert [run.info.status for run in before] == ["FINISHED", "KILLED"]
    assert [trial.state for trial in searches.study(body).trials()] == ["COMPLETE", "RUNNING"]

    assert searches.run_trials(body, attempt=2) == [1, 2]
    after = searches.trial_runs(body)
    assert [run.info.run_id for run in after[:2]] == [run.info.run_id for run in before]
    assert [run.info.status for run in after] == ["FINISHED"] * 3
    ranks = begun.read_text().split()
    assert len(ranks) == 4
    assert ranks[1] == ranks[2], "the trial that was cut off went on in its folder"
    assert len(set(ranks)) == 3


def test_a_trial_of_other_data_is_not_compared(searches: SearchWorkplace) -> None:
    searches.trains(
        "digest = 'changed' if rank == 4 else 'as it was'\n"
        "write({'kind': 'dataset', 'context': 'training', 'digest': digest})\n"
        "finish(metrics={'validation_loss': 1.0})"
    )
    body = searches.body("data-1", {"seed": 1})
    searches.plan(body)
    searches.run_trials(body)
    trials = sorted(searches.study(body).trials(), key=lambda trial: trial.number)
    first = trials[0].attributes["data"]
    for trial in trials:
        if trial.attributes["data"] == first:
            assert trial.state == "COMPLETE"
        else:
            assert (trial.state, str(trial.error)[:44]) == (
                "FAIL",
                "Its data is not that of the trials before, w",
            )
    assert {trial.state for trial in trials} == {"COMPLETE", "FAIL"}


def test_a_trial_that_a_newer_attempt_has_taken_over_is_left_to_it(searches: SearchWorkplace) -> None:
    sign, go = searches.data / "sign", searches.data / "go"
    searches.trains(
        f"Path({str(sign)!r}).touch()\n"
        "import time\n"
        f"while not Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "sys.exit(143)"
    )
    body = searches.body("newer-1", {"n_trials": 1})
    searches.plan(body)

    def take_over() -> None:
        wait_until(sign.exists)
        (run,) = searches.trial_runs(body)
        searches.client.set_tag(run.info.run_id, "post_training.attempt_id", attempt_id(2))
        go.touch()

    newer = threading.Thread(target=take_over)
    newer.start()
    with pytest.raises(AirflowFailException, match="A newer attempt at this trial runs"):
        searches.run_trials(body)
    newer.join()
    (run,), (trial,) = searches.trial_runs(body), searches.study(body).trials()
    assert run.info.status == "RUNNING"
    assert (trial.state, trial.attributes.get("attempts")) == ("RUNNING", None)
    with pytest.raises(AirflowFailException, match="A newer attempt at this trial runs"):
        searches.run_trials(body)


@pytest.mark.parametrize(("ends", "state"), [("complete", "COMPLETE"), ("prune", "PRUNED"), ("fail", "FAIL")])
def test_a_trial_whose_run_has_ended_is_not_trained_again(
    searches: SearchWorkplace, monkeypatch: pytest.MonkeyPatch, ends: str, state: str
) -> None:
    searches.trains(
        {
            "complete": "finish(metrics={'validation_loss': 3.0})",
            "prune": "finish(metrics={'validation_loss': 3.0})",
            "fail": "finish(status='failed', error='Too large.', permanent=True)",
        }[ends]
    )
    body = searches.body(f"killed-{ends}", {"n_trials": 1})
    searches.plan(body)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Search, "fail" if ends == "fail" else "complete", die)
        with pytest.raises(KeyboardInterrupt):
            searches.run_trials(body)
    (run,) = searches.trial_runs(body)
    assert run.info.status == ("FAILED" if ends == "fail" else "FINISHED")
    searches.client.log_metric(run.info.run_id, "validation_loss", 3.0)
    if ends == "prune":
        searches.client.set_tag(run.info.run_id, "post_training.trial_state", "pruned")
    searches.trains("sys.exit('it is trained again')")
    assert searches.run_trials(body, attempt=2) == [0]
    (trial,) = searches.study(body).trials()
    assert (trial.state, trial.error) == (state, "Too large." if ends == "fail" else None)
    assert trial.value == (3.0 if ends == "complete" else None)
    (after,) = searches.trial_runs(body)
    assert after.info.status == {"complete": "FINISHED", "prune": "KILLED", "fail": "FAILED"}[ends]


def test_trials_that_nobody_ran_are_told_of(searches: SearchWorkplace) -> None:
    sign = searches.data / "sign"
    searches.trains(
        f"sign = Path({str(sign)!r}); first = not sign.exists()\n"
        "import time\n"
        "if not first:\n"
        "    Path(str(sign) + '2').touch()\n"
        "    for _ in range(600): print('working'); time.sleep(0.1)\n"
        "sign.touch(); finish(metrics={'validation_loss': 1.0})"
    )
    body = searches.body("fewer-1", {"use": "retrain"})
    searches.plan(body)
    operator = searches.trials(body)
    killer = searches.stops(operator, Path(f"{sign}2"))
    with pytest.raises(AirflowException, match="stopped"):
        operator.execute(searches.at("trials", body, map_index=0))
    killer.join()
    searches.trains("finish(metrics={'train_loss': 0.5})")
    searches.train(body)
    warning = searches.job_run(body).data.tags["post_training.warning"]
    assert warning.startswith("Only 2 of 3 trials were run: workers failed before the others")


def test_the_best_trials_checkpoints_are_the_jobs(searches: SearchWorkplace) -> None:
    body = searches.body("best-1", {"max_parallel": 2})
    searches.plan(body)
    searches.run_trials(body, worker=1)
    searches.run_trials(body, worker=0)
    paths = {}
    for run in searches.trial_runs(body):
        searches.client.log_metric(run.info.run_id, "validation_loss", float(run.data.params[RANK]))
        searches.client.log_metric(run.info.run_id, "device_seconds", 2.0)
        searches.client.set_tag(run.info.run_id, "post_training.resources", '{"seconds": 2, "tokens": 10}')
        paths[run.data.params[RANK]] = searches.upload(run, 0, float(run.data.params[RANK]))
    searches.trains("sys.exit('nothing is trained')")
    outcome = searches.train(body)
    assert outcome["metrics"]["validation_loss"] == 2.0
    (checkpoint,) = outcome["checkpoints"]
    assert checkpoint["path"] == paths["2"]
    assert (checkpoint["identifier"], checkpoint["post_training_job_id"]) == ("best-1-epoch-0", "best-1")

    run = searches.job_run(body)
    found = searches.tracking.find("best-1")
    assert found is not None
    assert [one.path for one in searches.tracking.checkpoints(found)] == [paths["2"]]
    assert run.info.status == "FINISHED"
    assert run.data.params[RANK] == "2"
    assert run.data.metrics["validation_loss"] == 2.0
    assert (run.data.metrics["search_device_seconds"], run.data.metrics["search_tokens"]) == (6.0, 30.0)
    assert "device_seconds" not in run.data.metrics, "it has used nothing beside its trials"
    assert "post_training.warning" not in run.data.tags
    assert json.loads(run.data.tags["post_training.resources"])["device_seconds"] == 6.0
    (best,) = [one for one in searches.trial_runs(body) if one.data.params[RANK] == "2"]
    assert run.data.tags["post_training.best_trial_run"] == best.info.run_id
    assert run.data.tags["post_training.best_trial"] == best.data.tags["post_training.trial"]


def test_what_was_tried_is_shown_in_the_jobs_run(searches: SearchWorkplace) -> None:
    space = {
        RANK: {"type": "int", "low": 1, "high": 64},
        "algorithm_config.alpha": {"type": "int", "low": 1, "high": 64, "log": True},
    }
    body = searches.body("shown-1", {"space": space, "sampler": "random", "n_trials": 4, "use": "retrain"})
    searches.plan(body)
    searches.run_trials(body)
    searches.train(body)
    run_id = searches.job_run(body).info.run_id
    files = {file.path: file.file_size for file in searches.client.list_artifacts(run_id, "search")}
    assert set(files) == {
        "search/trials.json",
        "search/optimization_history.png",
        "search/parameter_importances.png",
    }
    for name in ("optimization_history", "parameter_importances"):
        picture = Path(searches.client.download_artifacts(run_id, f"search/{name}.png")).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5_000
    table = json.loads(Path(searches.client.download_artifacts(run_id, "search/trials.json")).read_text())
    assert table["columns"] == ["trial", "state", "validation_loss", *space, "mlflow_run_id", "error"]
    assert [row[0] for row in table["data"]] == [0, 1, 2, 3]
    assert all(row[2] == row[3] for row in table["data"]), "the stand-in's loss is its rank"


def test_the_best_values_are_trained_anew_if_so_asked(searches: SearchWorkplace) -> None:
    body = searches.body("retrain-1", {"use": "retrain"}, logger_config={"log_model": "all"})
    searches.plan(body)
    searches.run_trials(body)
    copy = searches.data.parent / "spec.json"
    searches.trains(
        f"Path({str(copy)!r}).write_text(json.dumps(spec))\n{{}}\nfinish(metrics={{'train_loss': 0.5}})"
    )
    outcome = searches.train(body)
    spec = json.loads(copy.read_text())
    assert spec["request"]["algorithm_config"]["rank"] == 2
    assert spec["request"]["hyperparam_search_config"] == {}
    run = searches.job_run(body)
    assert spec["tracking"]["run_id"] == run.info.run_id
    assert (run.info.status, run.data.params[RANK]) == ("FINISHED", "2")
    assert outcome["metrics"] == {"train_loss": 0.5}


def test_an_attempt_after_another_takes_the_same_trial(searches: SearchWorkplace) -> None:
    body = searches.body("again-1", {"use": "retrain"})
    searches.plan(body)
    searches.run_trials(body)
    searches.trains("sys.exit(3)")
    with pytest.raises(AirflowException, match="exit code 3"):
        searches.train(body)
    chosen = searches.job_run(body).data.tags["post_training.best_trial"]
    other = next(trial.number for trial in searches.study(body).trials() if str(trial.number) != chosen)
    searches.client.set_tag(searches.job_run(body).info.run_id, "post_training.best_trial", str(other))
    copy = searches.data.parent / "spec.json"
    searches.trains(f"Path({str(copy)!r}).write_text(json.dumps(spec)); finish(metrics={{}})")
    searches.train(body, attempt=2)
    rank = searches.study(body).trial(other).values[RANK]
    assert json.loads(copy.read_text())["request"]["algorithm_config"]["rank"] == rank


def test_a_job_of_which_no_trial_was_finished_fails_with_the_reason(searches: SearchWorkplace) -> None:
    searches.trains("finish(status='failed', error='No row can be used.', permanent=True)")
    body = searches.body("none-1")
    searches.plan(body)
    searches.run_trials(body)
    with pytest.raises(AirflowFailException, match="None of the search's 3 trials was finished: No row can"):
        searches.train(body)
    run = searches.job_run(body)
    assert run.info.status == "FAILED"
    assert run.data.tags["post_training.error"].endswith("No row can be used.")


def test_a_job_whose_workers_have_tried_nothing_fails_with_the_reason(searches: SearchWorkplace) -> None:
    body = searches.body("none-2")
    searches.plan(body)
    with pytest.raises(AirflowFailException, match="has tried nothing"):
        searches.train(body)


def test_data_that_is_away_costs_no_trial(searches: SearchWorkplace) -> None:
    body = searches.body("away-1")
    searches.plan(body)
    file = Path(searches.train_file)
    rows = file.read_text()
    file.unlink()
    with pytest.raises(AirflowException, match="no such file") as caught:
        searches.run_trials(body)
    assert not isinstance(caught.value, AirflowFailException)
    file.write_text(rows)
    assert searches.run_trials(body, attempt=2) == [0, 1, 2]
    assert {trial.state for trial in searches.study(body).trials()} == {"COMPLETE"}


def test_a_job_that_is_cleared_takes_the_best_again_in_a_run_of_its_own(searches: SearchWorkplace) -> None:
    body = searches.body("cleared-1")
    searches.plan(body)
    searches.run_trials(body)
    for run in searches.trial_runs(body):
        for epoch in range(120):
            if epoch % 60 == 0 or run.data.params[RANK] == "2":
                searches.upload(run, epoch, float(run.data.params[RANK]))
    first = searches.train(body)
    assert len(first["checkpoints"]) == 120
    before = searches.job_run(body)
    second = searches.train(body, attempt=2)
    after = searches.job_run(body)
    assert after.info.run_id != before.info.run_id
    assert after.data.tags["post_training.supersedes"] == before.info.run_id
    assert [one["path"] for one in second["checkpoints"]] == [one["path"] for one in first["checkpoints"]]


def test_a_search_that_is_cleared_begins_anew(searches: SearchWorkplace) -> None:
    body = searches.body("anew-1", {"use": "retrain"})
    searches.plan(body)
    searches.run_trials(body)
    searches.train(body)
    before, tried = searches.job_run(body), searches.trial_runs(body)
    searches.states = {"train": "success"}
    with pytest.raises(AirflowSkipException, match="clear its task 'train', too"):
        searches.plan(body, attempt=2)
    searches.states = {}
    assert searches.plan(body, attempt=2) == [0]
    assert searches.client.get_run(before.info.run_id).info.status == "FINISHED"
    planned = searches.job_run(body)
    assert (planned.info.status, planned.data.tags["post_training.supersedes"]) == (
        "RUNNING",
        before.info.run_id,
    )
    assert searches.plan(body, attempt=3) == [0], "a retry goes on"
    assert searches.job_run(body).info.run_id == planned.info.run_id
    assert searches.run_trials(body, attempt=2) == [0, 1, 2]
    searches.train(body, attempt=4)
    after = searches.job_run(body)
    assert (after.info.run_id, after.info.status) == (planned.info.run_id, "FINISHED")
    assert {run.info.run_id for run in searches.trial_runs(body)}.isdisjoint(run.info.run_id for run in tried)


def test_trials_whose_worker_is_gone_have_failed_and_the_others_count(searches: SearchWorkplace) -> None:
    body = searches.body("gone-1", {"use": "retrain"})
    searches.plan(body)
    study = searches.study(body)
    left = study.next_trial(7)
    assert left is not None
    searches.run_trials(body)
    searches.train(body)
    states = {trial.number: (trial.state, trial.error) for trial in searches.study(body).trials()}
    assert states[left.number] == ("FAIL", "Its worker ended before it did.")
    assert [state for state, _ in states.values()].count("COMPLETE") == 2


def test_a_task_without_a_search_in_front_refuses_one_and_names_the_dag(searches: SearchWorkplace) -> None:
    body = searches.body("alone-1")
    with pytest.raises(AirflowFailException, match="trials run in the DAG 'supervised_fine_tune_search'"):
        searches.train(body, dag_id="supervised_fine_tune")
    run = searches.job_run(body)
    assert run.info.status == "FAILED"


def test_a_search_whose_storage_lacks_it_is_told_apart_from_one_that_nobody_makes(
    searches: SearchWorkplace,
) -> None:
    body = searches.body("elsewhere-1")
    with DAG("nightly", schedule=None):
        train = searches.over_mlflow(SupervisedFineTuneOperator(task_id="train", request=body))
        search_before(train)
    with pytest.raises(AirflowFailException, match=r"\[post_training\] search_storage holds no search"):
        train.execute(searches.at("train", body))


def test_the_tasks_of_a_search_are_named_and_run_as_the_jobs_is() -> None:
    with DAG("nightly", schedule=None) as dag:
        train = SupervisedFineTuneOperator(
            task_id="sft",
            model="org/model",
            pool="gpus",
            pool_slots=2,
            queue="large",
            priority_weight=7,
            retries=2,
            parent_run_id="a1" * 16,
            trigger_rule="none_failed",
        )
        EmptyOperator(task_id="extract") >> search_before(train)
    assert set(dag.task_ids) == {"extract", "sft_plan", "sft_trials", "sft"}
    assert train.upstream_task_ids == {"sft_plan", "sft_trials"}
    plan, trials = dag.get_task("sft_plan"), dag.get_task("sft_trials")
    assert plan.upstream_task_ids == {"extract"}
    assert (plan.fields, plan.job_task_id, plan.trigger_rule) == (
        {"model": "org/model"},
        "sft",
        "none_failed",
    )
    for name, value in {
        "pool": "gpus",
        "pool_slots": 2,
        "queue": "large",
        "priority_weight": 7,
        "retries": 2,
        "parent_run_id": "a1" * 16,
    }.items():
        assert getattr(plan, name) == trials.partial_kwargs[name] == value


def test_what_comes_before_a_job_comes_before_its_search() -> None:
    with DAG("nightly", schedule=None):
        train = SupervisedFineTuneOperator(task_id="sft", model="org/model")
        EmptyOperator(task_id="extract") >> train
        with pytest.raises(ValueError, match="extract must come before the plan"):
            search_before(train)
