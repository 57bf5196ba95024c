"""The training operators around a stand-in for the trainer: a program that a setting names."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from post_training import job_lock
from post_training.dataset_records import DatasetRecords
from post_training.errors import InvalidRequestError, RecordUnavailableError
from post_training.job_ids import TaskKey
from post_training.operators import patience
from post_training.operators.params import FORM_DEFAULTS
from post_training.operators.training import (
    PreferenceOptimizeOperator,
    SupervisedFineTuneOperator,
    TrainingOperator,
)
from post_training.record import identity_tags
from post_training.schemas.flat import flatten
from post_training.schemas.requests import SupervisedFineTuneRequest
from post_training.schemas.trainer import TrainerSpec
from tests.operators.conftest import connect
from tests.operators.workplace import KEY, RESULT, Workplace, attempt_id
from tests.requests_of import QAT, sft_body
from tests.waiting import wait_until

FSDP = sft_body(training_config__efficiency_config={"fsdp_cpu_offload": True})["training_config"]


def appears(file: Path) -> bool:
    """Wait for a file."""
    return wait_until(file.exists)


def test_a_job_is_trained_and_recorded(workplace: Workplace) -> None:
    workplace.trains(f"print('loss 1.5'); result = {RESULT!r}")
    returned = workplace.operator().execute(workplace.context())
    assert returned == {
        "job_uuid": "job-1",
        "mlflow_run_id": "run-1",
        "checkpoints": [],
        "metrics": {"train_loss": 1.5},
    }
    tracking = workplace.tracking
    assert tracking.statuses == ["RUNNING", "FINISHED"]
    assert tracking.files == {"logs/train-1.log": "loss 1.5\n"}
    assert tracking.runs["run-1"].tags["airflow.url"] == "http://airflow/run"
    assert tracking.runs["run-1"].tags["post_training.attempt"] == "1"
    assert not workplace.work_dir.exists()


def test_the_trainer_is_told_everything(workplace: Workplace) -> None:
    spec = workplace.spec_of(workplace.operator(runtime={"max_seq_length": 64}))
    assert (spec.model, spec.model_roots) == ("org/model", (workplace.data.parent,))
    assert spec.train_data == str(workplace.data)
    assert (spec.validation_data, spec.checkpoint_dir, spec.attempt) == (None, None, 1)
    assert spec.tracking is not None
    assert (spec.tracking.tracking_uri, spec.tracking.run_id) == ("http://mlflow", "run-1")
    assert spec.request.runtime is not None
    assert (spec.request.runtime.seed, spec.request.runtime.max_seq_length) == (7, 64)
    assert workplace.tracking.params["runtime.seed"] == 7


@pytest.mark.parametrize(("permanent", "error"), [(True, AirflowFailException), (False, AirflowException)])
def test_a_failure_is_recorded_and_repeated_only_if_it_helps(
    workplace: Workplace, permanent: bool, error: type[Exception]
) -> None:
    workplace.trains(f"result = {{'status': 'failed', 'error': 'Row 3 is bad.', 'permanent': {permanent}}}")
    with pytest.raises(error, match=r"Row 3 is bad\.") as caught:
        workplace.operator().execute(workplace.context())
    assert isinstance(caught.value, AirflowFailException) is permanent
    run = workplace.tracking.runs["run-1"]
    assert (run.status, run.tags["post_training.error"]) == ("FAILED", "Row 3 is bad.")


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("os.kill(os.getpid(), 9)", "killed by signal 9; out of memory is a usual cause"),
        ("sys.exit(4)", "ended with exit code 4 and no result"),
    ],
)
def test_a_trainer_that_leaves_no_result_is_told_apart(
    workplace: Workplace, program: str, sentence: str
) -> None:
    workplace.trains(program)
    with pytest.raises(AirflowException, match=sentence):
        workplace.operator().execute(workplace.context())
    assert sentence in workplace.tracking.runs["run-1"].tags["post_training.error"]


def test_an_earlier_attempts_result_is_not_taken_for_this_ones(workplace: Workplace) -> None:
    workplace.work_dir.mkdir(parents=True)
    (workplace.work_dir / "result.json").write_text(json.dumps(RESULT))
    workplace.trains("sys.exit(4)")
    with pytest.raises(AirflowException, match="no result"):
        workplace.operator().execute(workplace.context())


def test_a_killed_task_stops_its_trainer_and_leaves_its_record_to_airflows_state(
    workplace: Workplace,
) -> None:
    workplace.trains("(spec.parent / 'ready').touch(); time.sleep(600)")
    operator = workplace.operator()
    trained = []

    def kill_when_ready() -> None:
        trained.append(appears(workplace.work_dir / "ready"))
        operator.on_kill()

    killer = threading.Thread(target=kill_when_ready)
    killer.start()
    with pytest.raises(AirflowException, match="The job was stopped"):
        operator.execute(workplace.context())
    killer.join()
    assert trained == [True]
    assert workplace.tracking.statuses == ["RUNNING"]
    assert "post_training.error" not in workplace.tracking.runs["run-1"].tags


CANCELLED = {"post_training.cancelled_attempt": attempt_id(1)}


def test_a_job_cancelled_while_it_trains_stays_cancelled(workplace: Workplace) -> None:
    operator, tracking = workplace.operator(), workplace.tracking
    train = operator._train

    def cancel_meanwhile(spec: TrainerSpec, *rest: Any) -> Any:
        result = train(spec, *rest)
        tracking.set_tags("run-1", CANCELLED)
        tracking.set_status("run-1", "KILLED")
        return result

    operator._train = cancel_meanwhile  # type: ignore[method-assign]
    operator.execute(workplace.context())
    assert tracking.statuses == ["RUNNING", "KILLED"]


@pytest.mark.parametrize("moment", ["RUNNING", "FINISHED"])
def test_a_cancel_in_the_very_moment_of_a_write_is_not_overwritten(workplace: Workplace, moment: str) -> None:
    """The cancel's tag and status arrive between the task's look at the run and its write."""
    tracking = workplace.tracking
    write = tracking.set_status

    def cancel_first(run_id: str, status: str, *, error: str | None = None) -> None:
        if status == moment and "KILLED" not in tracking.statuses:
            tracking.set_tags(run_id, CANCELLED)
            write(run_id, "KILLED")
        write(run_id, status, error=error)

    tracking.set_status = cancel_first  # type: ignore[method-assign]
    with suppress(AirflowException):  # at the start it does not begin
        workplace.operator().execute(workplace.context())
    assert tracking.runs["run-1"].status == "KILLED"
    assert tracking.statuses[-3:] == ["KILLED", moment, "KILLED"]


def test_a_failure_that_is_tried_again_leaves_the_run_open(workplace: Workplace) -> None:
    workplace.trains("sys.exit(4)")
    with pytest.raises(AirflowException, match="no result"):
        workplace.operator().execute(workplace.context(max_tries=1))
    run = workplace.tracking.runs["run-1"]
    assert run.status == "RUNNING"
    assert "exit code 4" in run.tags["post_training.error"]
    with pytest.raises(AirflowException, match="no result"):
        workplace.operator().execute(workplace.context(attempt=2, max_tries=1))
    assert workplace.tracking.runs["run-1"].status == "FAILED"


def test_a_retry_of_a_job_that_was_done_trains_nothing(workplace: Workplace) -> None:
    """The task's own report to Airflow was lost, so Airflow tries again."""
    first = workplace.operator().execute(workplace.context(max_tries=3))
    workplace.trains("sys.exit('it was asked to train')")
    again = workplace.operator().execute(workplace.context(attempt=2, max_tries=3))
    assert again["mlflow_run_id"] == first["mlflow_run_id"]
    assert workplace.tracking.statuses == ["RUNNING", "FINISHED"]
    assert set(workplace.tracking.forgotten) == {"run-1"}
    assert not workplace.work_dir.exists()


def test_an_attempt_that_a_newer_one_has_replaced_does_not_begin(workplace: Workplace) -> None:
    workplace.fails("sys.exit(4)", attempt=2, max_tries=3)
    before = dict(workplace.tracking.runs)
    with pytest.raises(AirflowFailException, match="A newer attempt"):
        workplace.operator().execute(workplace.context(attempt=1, max_tries=3))
    shutil.rmtree(workplace.home)  # on another machine MLflow knows
    with pytest.raises(AirflowFailException, match="A newer attempt"):
        workplace.operator().execute(workplace.context(attempt=1, max_tries=3))
    assert workplace.tracking.runs == before


def test_an_attempt_that_is_replaced_while_it_trains_writes_no_end(workplace: Workplace) -> None:
    operator, tracking = workplace.operator(), workplace.tracking
    train = operator._train

    def replaced(spec: TrainerSpec, *rest: Any) -> Any:
        result = train(spec, *rest)
        tracking.set_tags("run-1", {"post_training.attempt_id": attempt_id(2)})
        workplace.work_dir.with_name("train.claim").write_text(attempt_id(2))
        return result

    operator._train = replaced  # type: ignore[method-assign]
    operator.execute(workplace.context(max_tries=3))
    assert tracking.statuses == ["RUNNING"]
    assert tracking.forgotten == []
    assert workplace.work_dir.exists(), "the newer attempt goes on from it"


def test_an_attempt_that_was_cancelled_is_not_tried_again(workplace: Workplace) -> None:
    """The cancel reached MLflow and not Airflow; the trainer saw it there and ended."""
    operator, tracking = workplace.operator(), workplace.tracking
    workplace.trains("sys.exit(143)")
    train = operator._train

    def cancelled(*arguments: Any) -> Any:
        tracking.set_tags("run-1", CANCELLED)
        tracking.set_status("run-1", "KILLED")
        return train(*arguments)

    operator._train = cancelled  # type: ignore[method-assign]
    with pytest.raises(AirflowFailException):
        operator.execute(workplace.context(max_tries=3))
    assert tracking.runs["run-1"].status == "KILLED"


def test_a_killed_record_of_an_earlier_attempt_does_not_stick(workplace: Workplace) -> None:
    """It was written late, when the job had been cleared and trained already."""
    operator, tracking = workplace.operator(), workplace.tracking
    train = operator._train

    def killed_late(*arguments: Any) -> Any:
        tracking.set_tags("run-1", CANCELLED)
        tracking.set_status("run-1", "KILLED")
        return train(*arguments)

    operator._train = killed_late  # type: ignore[method-assign]
    operator.execute(workplace.context(attempt=2, max_tries=3))
    assert tracking.runs["run-1"].status == "FINISHED"


def test_a_folder_that_was_another_runs_is_emptied(workplace: Workplace) -> None:
    """The DAG run was deleted and submitted again, with another request and another MLflow run."""
    workplace.fails("(spec.parent / 'state').touch(); sys.exit(4)", max_tries=3)
    workplace.tracking.runs.clear()
    workplace.tracking.create_run(name="", experiment=None, tags=identity_tags(KEY), params={}, request={})
    workplace.trains("sys.exit(5 if (spec.parent / 'state').exists() else 6)")
    with pytest.raises(AirflowException, match="exit code 6"):
        workplace.operator().execute(workplace.context(attempt=2, max_tries=3))


@pytest.mark.parametrize(("conf", "error"), [({"mlflow_run_id": "run-1"}, AirflowException), ({}, None)])
def test_what_is_not_there_any_more_is_looked_for_again(
    workplace: Workplace, conf: dict[str, Any], error: type[Exception] | None
) -> None:
    """It was there at submit: a disk may be away. What a form names was never looked for."""
    workplace.tracking.create_run(name="", experiment=None, tags=identity_tags(KEY), params={}, request={})
    workplace.data.unlink()
    with pytest.raises(AirflowException, match="no such file") as caught:
        workplace.operator().execute(workplace.context(conf=conf, max_tries=3))
    assert isinstance(caught.value, AirflowFailException) is (error is None)
    assert workplace.tracking.runs["run-1"].status == ("RUNNING" if error else "FAILED")


def test_a_record_that_does_not_answer_is_waited_for(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    tracking, outage = workplace.tracking, iter([True] * 3)
    answer = tracking._answer

    def recover() -> None:
        tracking.down = next(outage, False)
        answer()

    monkeypatch.setattr(tracking, "_answer", recover)
    workplace.operator().execute(workplace.context())
    assert next(outage, None) is None
    assert tracking.statuses == ["RUNNING", "FINISHED"]


def test_all_attempts_read_the_same_version_of_a_registered_data_set(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = iter(["runs:/first/rows.jsonl", "runs:/second/rows.jsonl"])
    monkeypatch.setattr(DatasetRecords, "uri", lambda self, dataset_id, digest: next(versions))
    config = sft_body(training_config__data_config__dataset_id="nightly-rows")["training_config"]
    for _ in range(2):
        assert workplace.spec_of(workplace.operator(training_config=config)).train_data == (
            "runs:/first/rows.jsonl"
        )


def test_a_version_that_somebody_wrote_into_mlflow_is_only_read_from_mlflow(workplace: Workplace) -> None:
    tags = identity_tags(KEY) | {"post_training.train_data": "/etc/rows.jsonl"}
    workplace.tracking.create_run(name="", experiment=None, tags=tags, params={}, request={})
    assert workplace.spec_of(workplace.operator()).train_data == str(workplace.data)


def test_two_attempts_in_one_folder_run_one_after_the_other(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one's trainer is told by the claim of the newer one; here it looks at it itself."""
    claim, waits = (workplace.work_dir.with_name(name) for name in ("train.claim", "waits"))
    monkeypatch.setattr(job_lock, "sleep", lambda seconds: (waits.touch(), sleep(seconds)))
    workplace.trains(
        "attempt = json.loads(spec.read_text())['attempt_id']\n"
        "(spec.parent / 'ready').touch()\n"
        f"claim = Path({str(claim)!r})\n"
        "log = spec.parent.parent / 'order'\n"
        "if attempt.endswith('1'):\n"
        "    while claim.read_text() <= attempt: time.sleep(0.01)\n"
        f"    while not (Path({str(waits)!r}).exists() or log.exists()): time.sleep(0.01)\n"
        "    log.open('a').write('first ends,')\n"
        "    sys.exit(143)\n"
        "log.open('a').write('second begins,')\n"
        f"result = {RESULT!r}"
    )

    def be_replaced() -> None:
        with pytest.raises(AirflowException):
            workplace.operator().execute(workplace.context(max_tries=3))

    first = threading.Thread(target=be_replaced)
    first.start()
    assert appears(workplace.work_dir / "ready")
    workplace.operator().execute(workplace.context(attempt=2, max_tries=3))
    first.join()
    assert (workplace.work_dir.parent / "order").read_text() == "first ends,second begins,"
    assert workplace.tracking.runs["run-1"].status == "FINISHED"


def test_the_run_made_at_submit_is_used(workplace: Workplace) -> None:
    workplace.tracking.create_run(name="", experiment=None, tags=identity_tags(KEY), params={}, request={})
    workplace.operator().execute(workplace.context(conf={"mlflow_run_id": "run-1"}))
    assert list(workplace.tracking.runs) == ["run-1"]


def test_a_cleared_job_that_had_completed_is_a_new_training(workplace: Workplace) -> None:
    workplace.operator().execute(workplace.context(max_tries=3))
    workplace.operator().execute(workplace.context(attempt=2, max_tries=4))  # clearing raises the limit
    first, second = workplace.tracking.runs.values()
    assert (first.status, second.status) == ("FINISHED", "FINISHED")
    assert first.tags["post_training.job_uuid"] == "job-1 (superseded)"
    assert second.tags["post_training.job_uuid"] == "job-1"


def test_the_end_of_the_attempt_before_is_at_no_moment_this_one_s(workplace: Workplace) -> None:
    """Who reads the job while it begins anew would report that it has ended."""
    workplace.fails("sys.exit(4)")
    tracking, seen = workplace.tracking, []
    assert tracking.runs["run-1"].status == "FAILED"
    for name in ("set_tags", "set_status"):
        write = getattr(tracking, name)

        def watched(*args: Any, write: Any = write, **kwargs: Any) -> None:
            write(*args, **kwargs)
            run = tracking.runs["run-1"]
            seen.append((run.tags["post_training.attempt_id"] == attempt_id(2), run.status))

        setattr(tracking, name, watched)
    workplace.trains(f"result = {RESULT!r}")
    workplace.operator().execute(workplace.context(attempt=2, max_tries=1))
    assert (True, "FAILED") not in seen
    assert seen[-1] == (True, "FINISHED")


def test_what_is_trained_from_changed_data_has_a_run_of_its_own(workplace: Workplace) -> None:
    workplace.fails("(spec.parent / 'state').touch(); sys.exit(4)", max_tries=1)
    changed = {"status": "inputs_changed", "error": "The data changed."}
    workplace.trains(f"result = {changed!r} if (spec.parent / 'state').exists() else {RESULT!r}")
    result = workplace.operator().execute(workplace.context(attempt=2, max_tries=1))
    first, second = workplace.tracking.runs.values()
    assert (first.status, second.status) == ("FAILED", "FINISHED")
    assert first.tags["post_training.error"] == "The data changed."
    assert first.tags["post_training.job_uuid"] == "job-1 (superseded)"
    assert second.tags["post_training.job_uuid"] == "job-1"
    assert second.tags["post_training.supersedes"] == first.run_id
    assert result["mlflow_run_id"] == second.run_id
    assert first.run_id in workplace.tracking.forgotten
    assert not workplace.work_dir.exists()


def test_a_cancel_while_a_run_is_left_for_another_stays_with_the_job(workplace: Workplace) -> None:
    workplace.trains("result = {'status': 'inputs_changed', 'error': 'The data changed.'}")
    tracking = workplace.tracking
    write = tracking.set_tags

    def cancel_first(run_id: str, tags: Mapping[str, str]) -> None:
        if "(superseded)" in tags.get("post_training.job_uuid", ""):
            write(run_id, CANCELLED)
            tracking.set_status(run_id, "KILLED")
        write(run_id, tags)

    tracking.set_tags = cancel_first  # type: ignore[method-assign]
    with pytest.raises(AirflowFailException, match="was cancelled"):
        workplace.operator().execute(workplace.context(max_tries=3))
    run = tracking.find("job-1")
    assert run is not None
    assert (run.run_id, run.status) == ("run-2", "KILLED")


@pytest.mark.parametrize("write", range(1, 9))
def test_an_attempt_that_is_cut_off_between_two_runs_leaves_one_job(workplace: Workplace, write: int) -> None:
    """Whichever of its writes to MLflow is the last: the next attempt ends what it began."""
    tracking = workplace.tracking
    workplace.fails("(spec.parent / 'state').touch(); sys.exit(4)", max_tries=3)
    changed = {"status": "inputs_changed", "error": "The data changed."}
    workplace.trains(f"result = {changed!r} if (spec.parent / 'state').exists() else {RESULT!r}")
    operator, writes = workplace.operator(), []

    class Cut(BaseException):
        pass

    def cut_off(call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if tracking.cutting:  # type: ignore[attr-defined]
                writes.append(call)
                if len(writes) >= write:
                    raise Cut
            return call(*args, **kwargs)

        return called

    tracking.cutting = False  # type: ignore[attr-defined]
    for name in ("create_run", "set_tags", "set_status", "forget_state"):
        setattr(tracking, name, cut_off(getattr(tracking, name)))
    train = operator._train

    def then_cut(*args: Any) -> Any:
        result = train(*args)
        tracking.cutting = result.status == "inputs_changed"  # type: ignore[attr-defined]
        return result

    operator._train = then_cut  # type: ignore[method-assign]
    with suppress(Cut, AirflowException):
        operator.execute(workplace.context(attempt=2, max_tries=3))
    assert len(writes) >= write or write > 6
    tracking.cutting = False  # type: ignore[attr-defined]
    workplace.operator().execute(workplace.context(attempt=3, max_tries=3))
    first, second = tracking.runs.values()
    assert (first.status, second.status) == ("FAILED", "FINISHED")
    assert first.tags["post_training.job_uuid"] == "job-1 (superseded)"
    assert second.tags["post_training.supersedes"] == first.run_id
    assert tracking.find("job-1") == second
    assert first.run_id in tracking.forgotten


def test_a_run_that_an_attempt_leaves_is_not_gone_on_with(workplace: Workplace) -> None:
    """The older attempt has made the other run when this one begins, or makes it in that very moment."""
    tracking = workplace.tracking
    workplace.fails("sys.exit(4)", max_tries=3)
    write = tracking.set_tags

    def leave_first(run_id: str, tags: Mapping[str, str]) -> None:
        write(run_id, tags)
        if run_id == "run-1" and len(tracking.runs) == 1:
            superseding = {**identity_tags(KEY), "post_training.supersedes": "run-1"}
            tracking.create_run(name="", experiment=None, tags=superseding, params={}, request={})

    tracking.set_tags = leave_first  # type: ignore[method-assign]
    workplace.trains(f"result = {RESULT!r}")
    result = workplace.operator().execute(workplace.context(attempt=2, max_tries=3))
    assert result["mlflow_run_id"] == "run-2"
    assert [run.status for run in tracking.runs.values()] == ["FAILED", "FINISHED"]
    assert tracking.runs["run-1"].tags["post_training.job_uuid"] == "job-1 (superseded)"


def test_an_older_attempt_ends_no_run_in_which_a_newer_one_trains(workplace: Workplace) -> None:
    """It had made the other run, and MLflow did not take that back."""
    tracking = workplace.tracking
    workplace.fails("sys.exit(4)", attempt=2, max_tries=3)
    superseding = {**identity_tags(KEY), "post_training.supersedes": "run-1"}
    tracking.create_run(name="", experiment=None, tags=superseding, params={}, request={})
    before = tracking.runs["run-1"]
    shutil.rmtree(workplace.home)  # it runs on another machine
    with pytest.raises(AirflowFailException, match="A newer attempt"):
        workplace.operator().execute(workplace.context(attempt=1, max_tries=3))
    assert tracking.runs["run-1"] == before


def test_an_attempt_leaves_no_run_in_which_a_newer_one_has_begun(workplace: Workplace) -> None:
    tracking = workplace.tracking
    workplace.trains("result = {'status': 'inputs_changed', 'error': 'The data changed.'}")
    create = tracking.create_run

    def replaced_meanwhile(**arguments: Any) -> Any:
        run = create(**arguments)
        if "post_training.supersedes" in arguments["tags"]:
            tracking.set_tags("run-1", {"post_training.attempt_id": attempt_id(2)})
        return run

    tracking.create_run = replaced_meanwhile  # type: ignore[method-assign]
    with pytest.raises(AirflowFailException, match="A newer attempt"):
        workplace.operator().execute(workplace.context(max_tries=3))
    (run,) = tracking.runs.values()
    assert (run.status, run.tags["post_training.job_uuid"]) == ("RUNNING", "job-1")


def test_a_store_that_deletes_nothing_holds_up_no_job(workplace: Workplace) -> None:
    tracking = workplace.tracking
    forget = tracking.forget_state

    def refuse(run_id: str) -> None:
        if run_id == "run-1":
            raise RecordUnavailableError("it cannot be deleted")
        forget(run_id)

    tracking.forget_state = refuse  # type: ignore[method-assign]
    workplace.trains(
        "result = {'status': 'inputs_changed', 'error': 'The data changed.'}"
        f" if json.loads(spec.read_text())['tracking']['run_id'] == 'run-1' else {RESULT!r}"
    )
    assert workplace.operator().execute(workplace.context())["mlflow_run_id"] == "run-2"
    assert [run.status for run in tracking.runs.values()] == ["FAILED", "FINISHED"]


def test_what_is_refused_after_a_job_had_completed_has_a_run_of_its_own(workplace: Workplace) -> None:
    workplace.operator().execute(workplace.context(max_tries=3))
    broken = workplace.operator(training_config={"n_epochs": 0})
    with pytest.raises(AirflowFailException, match="n_epochs"):
        broken.execute(workplace.context(attempt=2, max_tries=4))
    first, second = workplace.tracking.runs.values()
    assert (first.status, second.status) == ("FINISHED", "FAILED")
    assert second.tags["post_training.supersedes"] == first.run_id
    assert workplace.tracking.find("job-1") == second
    workplace.operator().execute(workplace.context(attempt=3, max_tries=5))
    assert [run.status for run in workplace.tracking.runs.values()] == ["FINISHED", "FINISHED"]


def test_a_refusal_that_is_not_the_newest_attempts_is_not_recorded(workplace: Workplace) -> None:
    workplace.fails("sys.exit(4)", attempt=2, max_tries=3)
    before = dict(workplace.tracking.runs)
    with pytest.raises(AirflowFailException, match="n_epochs"):
        workplace.operator(training_config={"n_epochs": 0}).execute(workplace.context(attempt=1, max_tries=3))
    assert workplace.tracking.runs == before


@pytest.mark.parametrize("diverged", [False, True])
def test_of_what_failed_for_good_a_diverged_state_is_deleted(workplace: Workplace, diverged: bool) -> None:
    """A disk that is not mounted looks like data that are gone: who mends it clears the task."""
    workplace.fails(
        "(spec.parent / 'base').mkdir(); (spec.parent / 'state').touch(); sys.exit(4)", max_tries=3
    )
    failed = {"status": "failed", "error": "no such file", "permanent": True, "diverged": diverged}
    workplace.trains(f"result = {failed!r}")
    with pytest.raises(AirflowFailException, match="no such file"):
        workplace.operator().execute(workplace.context(attempt=2, max_tries=3))
    assert (workplace.work_dir / "state").exists() is not diverged
    assert not (workplace.work_dir / "base").exists(), "the copy may be what is wrong"
    assert (workplace.tracking.forgotten == []) is not diverged


def test_what_ended_before_it_was_superseded_keeps_its_end(workplace: Workplace) -> None:
    workplace.fails("(spec.parent / 'state').touch(); sys.exit(4)")
    tracking = workplace.tracking
    tracking.set_tags("run-1", CANCELLED)
    tracking.set_status("run-1", "KILLED")
    changed = {"status": "inputs_changed", "error": "The data changed."}
    workplace.trains(f"result = {changed!r} if (spec.parent / 'state').exists() else {RESULT!r}")
    workplace.operator().execute(workplace.context(attempt=2, max_tries=1))
    assert [run.status for run in tracking.runs.values()] == ["KILLED", "FINISHED"]
    assert "exit code 4" in tracking.runs["run-1"].tags["post_training.error"]


def test_an_older_run_of_the_same_id_is_not_taken_for_the_one_that_supersedes(workplace: Workplace) -> None:
    """Airflow has forgotten its DAG run, and the id was submitted again."""
    tracking = workplace.tracking
    workplace.operator().execute(workplace.context())
    tracking.create_run(name="", experiment=None, tags=identity_tags(KEY), params={}, request={})
    workplace.trains(
        "result = {'status': 'inputs_changed', 'error': 'The data changed.'}"
        f" if json.loads(spec.read_text())['tracking']['run_id'] == 'run-2' else {RESULT!r}"
    )
    workplace.operator().execute(workplace.context(conf={"mlflow_run_id": "run-2"}, attempt=2, max_tries=1))
    assert [run.status for run in tracking.runs.values()] == ["FINISHED", "FAILED", "FINISHED"]
    assert tracking.runs["run-3"].tags["post_training.supersedes"] == "run-2"


def test_a_dag_run_that_was_triggered_again_under_its_id_trains_again(workplace: Workplace) -> None:
    workplace.operator().execute(workplace.context())
    workplace.operator().execute(workplace.context())
    first, second = workplace.tracking.runs.values()
    assert (first.status, second.status) == ("FINISHED", "FINISHED")
    assert second.tags["post_training.supersedes"] == first.run_id


def test_a_run_that_supersedes_reads_the_same_versions_and_has_copies_of_its_own(
    workplace: Workplace,
) -> None:
    version = {"post_training.train_data": "runs:/" + "a" * 32 + "/rows.jsonl"}
    tracking = workplace.tracking
    tracking.create_run(name="", experiment=None, tags=identity_tags(KEY) | version, params={}, request={})
    copies = workplace.data.parent / "copies"
    workplace.trains(
        "told = json.loads(spec.read_text())\n"
        "with (spec.parents[4] / 'told').open('a') as file: print(json.dumps(told), file=file)\n"
        "result = {'status': 'inputs_changed', 'error': 'The default changed.'}"
        f" if told['tracking']['run_id'] == 'run-1' else {RESULT!r}"
    )
    operator = workplace.operator(checkpoint_dir=str(copies))
    operator.execute(workplace.context(conf={"mlflow_run_id": "run-1"}))
    told = [json.loads(line) for line in (workplace.home / "told").read_text().splitlines()]
    assert {spec["train_data"] for spec in told} == set(version.values())
    assert [spec["checkpoint_dir"] for spec in told] == [
        str(copies / "job-1"),
        str(copies / "job-1" / "run-2"),
    ]
    assert tracking.runs["run-2"].tags.items() >= version.items()


def test_a_failed_job_goes_on_unless_it_asks_for_something_else(workplace: Workplace) -> None:
    workplace.trains("(spec.parent / 'state').touch(); sys.exit(4)")
    for _ in range(2):
        with pytest.raises(AirflowException):
            workplace.operator().execute(workplace.context())
    assert list(workplace.tracking.runs) == ["run-1"]
    assert (workplace.work_dir / "state").exists()
    workplace.trains("sys.exit(0 if (spec.parent / 'state').exists() else 5)")
    with pytest.raises(AirflowException, match="exit code 5"):
        workplace.operator(runtime={"seed": 8}).execute(workplace.context())
    assert list(workplace.tracking.runs) == ["run-1", "run-2"]


def test_a_job_cancelled_while_it_was_starting_does_not_begin(workplace: Workplace) -> None:
    tags = {**identity_tags(KEY), **CANCELLED}
    workplace.tracking.create_run(name="", experiment=None, tags=tags, params={}, request={})
    workplace.tracking.set_status("run-1", "KILLED")
    with pytest.raises(AirflowFailException, match="cancelled before it began"):
        workplace.operator().execute(workplace.context())
    assert workplace.tracking.runs["run-1"].status == "KILLED"


def test_two_tasks_whose_names_add_up_to_one_id_share_nothing(workplace: Workplace) -> None:
    first, second = TaskKey("a", "b.c", "sft"), TaskKey("a", "b", "c.sft")
    for key in (first, second):
        workplace.operator().execute(workplace.context(key))
    assert [run.tags["airflow.run_id"] for run in workplace.tracking.runs.values()] == ["b.c", "b"]


def test_a_run_of_another_job_is_not_written_to(workplace: Workplace) -> None:
    workplace.tracking.create_run(
        name="", experiment=None, tags={"post_training.job_uuid": "other"}, params={}, request={}
    )
    workplace.operator().execute(workplace.context(conf={"mlflow_run_id": "run-1"}))
    assert workplace.tracking.runs["run-1"].status == "SCHEDULED"
    assert workplace.tracking.runs["run-2"].status == "FINISHED"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"training_config": {"n_epochs": 0}}, r"training_config\.n_epochs: .* got 0"),
        ({"model": "/no/model"}, "model: must lie under"),
        ({"algorithm_config": QAT | {"quantizer_name": "int2"}}, "quantizer_name: .* got 'int2'"),
        ({"logger_config": {"log_model": False}}, r"logger_config\.log_model: needs a checkpoint_dir"),
        (
            {"training_config": FSDP},
            r"training_config\.efficiency_config\.fsdp_cpu_offload: must be false: it shards",
        ),
    ],
)
def test_a_request_that_is_refused_has_a_record_that_says_why(
    workplace: Workplace, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AirflowFailException, match=sentence):
        workplace.operator(**fields).execute(workplace.context())
    (run,) = workplace.tracking.runs.values()
    assert run.status == "FAILED"
    assert run.tags["post_training.job_uuid"] == "job-1"
    assert run.tags["post_training.error"]


def test_a_stage_of_a_larger_dag_has_an_id_of_its_own(workplace: Workplace) -> None:
    request = workplace.operator().build_request(TaskKey("nightly", "run-1", "sft"))
    assert request.job_uuid == "nightly.run-1.sft"


def test_rendered_text_counts_as_the_value_it_says(workplace: Workplace) -> None:
    config = sft_body(training_config__n_epochs="3", training_config__data_config__shuffle="true")
    request = workplace.operator(training_config=config["training_config"]).build_request(KEY)
    assert request.training_config.n_epochs == 3
    assert request.training_config.data_config is not None
    assert request.training_config.data_config.shuffle is True


def test_the_whole_request_may_be_given_nested_flat_or_as_text(workplace: Workplace) -> None:
    body = sft_body()
    expected = SupervisedFineTuneRequest.model_validate(body)
    del body["job_uuid"]
    flat = {**flatten(expected), "mlflow_run_id": "run-1"}
    for given in (body, flat, json.dumps(body), json.dumps(flat)):
        operator = SupervisedFineTuneOperator(task_id="train", request=given)
        assert operator.build_request(KEY) == expected


def test_the_form_as_it_is_shown_makes_a_lora_request(workplace: Workplace) -> None:
    defaults = FORM_DEFAULTS["supervised_fine_tune"]
    typed = {"model": "org/model", "training_config.data_config.dataset_id": "train.jsonl"}
    operator = SupervisedFineTuneOperator(task_id="train", request={**defaults, **typed})
    request = operator.build_request(KEY)
    assert request.algorithm_config is not None
    assert request.training_config.max_steps_per_epoch == 0


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{'n_epochs': 1}", "request: must be an object or a JSON string of one.*tojson"),
        ("[]", "request: must be an object, got list"),
        ({"job_uuid": "another"}, "job_uuid: must be left out or be 'job-1'"),
    ],
)
def test_a_request_that_is_none_is_refused(workplace: Workplace, given: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        SupervisedFineTuneOperator(task_id="train", request=given).build_request(KEY)


def test_without_a_post_training_connection_the_schemas_defaults_hold(workplace: Workplace) -> None:
    operator = workplace.operator(post_training_conn_id="missing")
    operator.execute(workplace.context())
    assert workplace.tracking.runs["run-1"].status == "FINISHED"


def test_bad_defaults_in_the_connection_are_named(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch, host="http://airflow/post-training", extra={"runtime": {"sead": 7}})
    with pytest.raises(AirflowFailException, match=r"post_training_default extra runtime\.sead: Extra"):
        workplace.operator().execute(workplace.context())


def test_a_request_beside_single_fields_is_refused(workplace: Workplace) -> None:
    with pytest.raises(InvalidRequestError, match="training_config: was given beside request"):
        workplace.operator(request={}).build_request(KEY)


@pytest.mark.parametrize(
    ("base", "fields"),
    [(SupervisedFineTuneOperator, {"custom_operator_name": "House tuner"}), (TrainingOperator, {})],
)
def test_a_subclass_whose_tasks_would_not_be_found_is_refused(base: type, fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="HouseTuner: custom_operator_name must be one of Supervised"):
        type("HouseTuner", (base,), fields)


def test_a_job_is_recorded_where_the_deployment_looks_for_it() -> None:
    with pytest.raises(TypeError, match="mlflow_conn_id"):
        SupervisedFineTuneOperator(task_id="train", mlflow_conn_id="another")


def test_every_field_of_the_request_and_the_parent_run_are_templated() -> None:
    for operator, names in (
        (SupervisedFineTuneOperator, ("model", "checkpoint_dir")),
        (PreferenceOptimizeOperator, ("finetuned_model",)),
    ):
        expected = {
            "request",
            "training_config",
            "algorithm_config",
            "hyperparam_search_config",
            "logger_config",
            "runtime",
            "parent_run_id",
            *names,
        }
        assert set(operator.template_fields) == expected
