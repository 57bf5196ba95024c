"""What attempts used before: told by those that were killed, on this machine and on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from lightning_modules.callbacks import Resources
from lightning_modules.job import prepare_job
from lightning_modules.process import StopRequestedError
from lightning_modules.record import open_record
from lightning_modules.spool import Spool
from lightning_modules.train import main
from lightning_modules.used import Used, most_used
from post_training.schemas.record import TAG_RESOURCES
from post_training.schemas.trainer import TrackingTarget, TrainerSpec
from tests.lightning_modules.recorded import begun, points, retried
from tests.lightning_modules.trainers import (
    finish,
    kill,
    result_of,
    start,
    wait_for,
    wait_for_pause,
    write,
)

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer


def test_sums_are_kept_to_the_millisecond() -> None:
    assert Used(1.5, 10).plus(0.12345, 5) == Used(1.623, 15)


def test_the_most_that_was_told_counts() -> None:
    assert most_used([]) == Used()
    older = '{"device_seconds": 9.5, "job_tokens": 3}'
    newer = '{"device_seconds": 10.5, "job_tokens": 5, "seconds": 1.0}'
    assert most_used([newer, older]) == most_used([older, newer]) == Used(10.5, 5)
    assert most_used(['{"seconds": 1.0, "tokens": 5}']) == Used()  # of a version that did not count


def told(spec: TrainerSpec) -> list[dict[str, Any]]:
    """Every value of the tag in a job's folder."""
    lines = [json.loads(line) for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines()]
    return [json.loads(line["value"]) for line in lines if line.get("key") == TAG_RESOURCES]


def test_a_spool_holds_the_last_value_of_a_tag(make_spec: Any) -> None:
    record = open_record(make_spec())
    assert record.left("a") == []
    record.set_tag("a", "1")
    record.set_tag("b", "2")
    record.set_tag("a", "3")
    assert open_record(make_spec()).left("a") == ["3"]


def test_a_run_holds_what_was_told_elsewhere(client: MlflowClient, run_id: str, spec: TrainerSpec) -> None:
    client.set_tag(run_id, "a", "elsewhere")
    again = retried(spec)
    Spool(spec.work_dir / "metrics.jsonl", run_id).append([{"kind": "tag", "key": "a", "value": "here"}])
    record = begun(again)
    assert sorted(record.left("a")) == ["elsewhere", "here"]
    assert record.left("b") == []
    record.close()


def test_a_second_attempt_goes_on_from_the_first_one_s_sums(make_spec: Any) -> None:
    def stopped_after(steps: int) -> Any:
        resources = Resources(record, every_seconds=0.0)
        made = prepare_job(
            spec,
            record,
            [resources],
            should_stop=lambda: made.module.optimizer_steps >= steps,
            before_weights=resources.begin,
        )
        return made, resources

    spec = make_spec(training={"n_epochs": 2, "max_validation_steps": 0})
    record = open_record(spec)
    made, first = stopped_after(3)
    with pytest.raises(StopRequestedError):
        made.run()
    assert first.used().job_tokens == made.module.tokens_seen > 0
    shutil.rmtree(spec.work_dir / "resume")  # what it trained is lost
    spec = retried(spec)
    record = open_record(spec)
    made, second = stopped_after(1000)
    made.run()
    assert second.summary()["tokens"] == made.module.tokens_seen
    assert second.used().job_tokens == made.module.tokens_seen + first.used().job_tokens
    assert second.used().device_seconds >= first.used().device_seconds + second.summary()["seconds"]


def test_a_whole_job_says_what_it_used_and_trained(make_spec: Any, read_metrics: Any) -> None:
    spec = make_spec()
    assert main([str(write(spec))]) == 0
    resources, seen = result_of(spec).resources, result_of(spec).metrics["tokens_seen"]
    assert resources["tokens"] == resources["job_tokens"] == seen
    assert resources["device_seconds"] >= resources["seconds"] > 0
    assert told(spec)[-1] == resources
    assert set(told(spec)[0]) == {"device_seconds", "job_tokens"}
    keys = [
        json.loads(line).get("key") for line in (spec.work_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert keys.index(TAG_RESOURCES) < keys.index("effective_dtype"), "it begins when the weights are read"
    assert read_metrics(spec.work_dir, "device_seconds") == [resources["device_seconds"]]
    assert read_metrics(spec.work_dir, "job_tokens") == [seen]


def test_a_job_that_fails_before_the_weights_used_nothing(make_spec: Any) -> None:
    spec = make_spec(train_data="/no/rows.jsonl")
    assert main([str(write(spec))]) == 1
    assert not (spec.work_dir / "metrics.jsonl").exists() or told(spec) == []


def test_what_a_killed_attempt_used_is_in_the_job_s_total(
    client: MlflowClient, run_id: str, make_spec: Any, server: MLflowServer, tmp_path: Path
) -> None:
    """On another machine: MLflow alone knows of it."""
    target = TrackingTarget(tracking_uri=server.uri, run_id=run_id)
    spec = make_spec(tracking=target, training={"n_epochs": 2}, work_dir=tmp_path / "a")
    process = start(spec, pause_at=3)

    def recorded() -> dict[str, Any]:
        text = client.get_run(run_id).data.tags.get(TAG_RESOURCES, "{}")
        found: dict[str, Any] = json.loads(text)
        return found

    try:
        wait_for_pause(process, spec)
        wait_for(process, lambda: recorded().get("job_tokens"))
    finally:
        kill(process)
    lost = recorded()
    assert lost["device_seconds"] > 0
    assert "seconds" not in lost, "it had no end"

    again = retried(spec, work_dir=tmp_path / "b")
    finish(start(again))
    resources = result_of(again).resources
    assert resources["device_seconds"] >= lost["device_seconds"] + resources["seconds"]
    assert resources["job_tokens"] == lost["job_tokens"] + resources["tokens"]
    assert recorded() == resources
    assert points(client, run_id, "device_seconds") == [(10, resources["device_seconds"])]
