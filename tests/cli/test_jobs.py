"""The commands on jobs, against the real API on a real port."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from post_training.client import PostTrainingClient
from post_training.errors import RecordUnavailableError
from post_training.job_ids import TaskKey
from post_training.record import identity_tags
from post_training.schemas.jobs import (
    Checkpoint,
    ListPostTrainingJobsResponse,
    PostTrainingJob,
    PostTrainingMetric,
)
from tests.cli.conftest import Airflow, Cli, write_request
from tests.fakes import NOW, task
from tests.requests_of import dpo_body, rlhf_body, sft_body

KEY = TaskKey("supervised_fine_tune", "job-1", "train")
CHECKPOINT = Checkpoint(
    identifier="job-1-epoch-0",
    created_at=NOW,
    epoch=0,
    post_training_job_id="job-1",
    path="models:/m-1[x]",
    training_metrics=PostTrainingMetric(epoch=0, train_loss=1.25, validation_loss=None, perplexity=3.5),
)

pytestmark = pytest.mark.usefixtures("servers")


@pytest.fixture
def job(airflow: Airflow) -> Airflow:
    """A job that runs and has a checkpoint."""
    airflow.runs.add(task(KEY, "running", {"mlflow_run_id": "run-1"}))
    airflow.tracking.create_run(name="", experiment=None, tags=identity_tags(KEY), params={}, request={})
    airflow.tracking.made.append(CHECKPOINT)
    return airflow


@pytest.mark.parametrize("body", [sft_body(), dpo_body(), rlhf_body()])
def test_a_file_s_request_is_submitted(
    airflow: Airflow, folder: Path, cli: Cli, body: dict[str, object]
) -> None:
    file = write_request(folder / "request.yaml", body)
    done = cli("submit", file)
    assert (done.exit_code, done.stdout) == (0, "job-1\n")
    assert airflow.runs.triggered == ["job-1"]
    again = cli("submit", file, "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (0, {"job_uuid": "job-1"})
    assert airflow.runs.triggered == ["job-1"]


def test_a_job_that_has_no_id_gets_one(airflow: Airflow, folder: Path, cli: Cli) -> None:
    file = write_request(folder / "lora.yaml", sft_body(job_uuid=...))
    ids = [cli("submit", file).stdout.strip() for _ in range(2)]
    assert all(job_uuid.startswith("lora-20") for job_uuid in ids)
    assert cli("submit", file, "--job-uuid", "mine").stdout == "mine\n"
    assert airflow.runs.triggered == [*ids, "mine"]


def test_what_is_wrong_is_told_a_line_each_with_its_field(airflow: Airflow, folder: Path, cli: Cli) -> None:
    file = write_request(folder / "request.yaml", sft_body(colour="red", training_config__n_epochs=0))
    done = cli("submit", file)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "training_config.n_epochs: Input should be greater than or equal to 1, got 0",
        "colour: Extra inputs are not permitted",
    ]
    file.write_text("a: [")
    done = cli("submit", file)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"{file}:1: cannot be read as YAML: ")
    assert airflow.runs.triggered == []


def test_with_json_errors_are_json(folder: Path, cli: Cli) -> None:
    done = cli("submit", write_request(folder / "request.yaml", sft_body(colour="red")), "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert json.loads(done.stderr) == {
        "error": "colour: Extra inputs are not permitted",
        "errors": [{"loc": ["colour"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}],
    }
    done = cli("status", "--json", "nothing")
    assert (done.exit_code, done.stdout) == (3, "")
    assert json.loads(done.stderr) == {"error": "no post-training job 'nothing'"}


def test_another_request_of_the_same_id_is_a_conflict(folder: Path, cli: Cli) -> None:
    assert cli("submit", write_request(folder / "a.yaml", sft_body())).exit_code == 0
    done = cli("submit", write_request(folder / "b.yaml", sft_body(training_config__n_epochs=2)))
    assert done.exit_code == 4
    assert "belongs to a job with another request" in done.stderr


def test_jobs_are_listed(job: Airflow, cli: Cli) -> None:
    job.runs.add(task(replace(KEY, run_id="job-2"), "success"))
    assert cli("list").stdout == "job-2\njob-1\n"
    assert cli("list", "--limit", 1).stdout == "job-2\n"
    assert cli("list", "--limit", 0).stdout == "job-2\njob-1\n"
    assert json.loads(cli("list", "--json").stdout) == {
        "data": [{"job_uuid": "job-2"}, {"job_uuid": "job-1"}]
    }
    assert cli("list", "--limit", -1).exit_code == 2


def test_jobs_are_listed_with_their_statuses(job: Airflow, cli: Cli) -> None:
    lines = cli("list", "--status").stdout.splitlines()
    assert lines[0].split() == ["job", "status", "scheduled", "ended", "error"]
    assert lines[1].split()[:2] == ["job-1", "in_progress"]
    (found,) = json.loads(cli("list", "--status", "--json").stdout)["data"]
    assert (found["status"], found["checkpoints"][0]["path"]) == ("in_progress", "models:/m-1[x]")


def test_a_job_that_is_deleted_meanwhile_is_left_out(
    job: Airflow, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ListPostTrainingJobsResponse(
        data=[PostTrainingJob(job_uuid="deleted"), PostTrainingJob(job_uuid="job-1")]
    )
    monkeypatch.setattr(PostTrainingClient, "list_jobs", lambda _: listed)
    done = cli("list", "--status", "--json")
    assert done.exit_code == 0
    assert [found["job_uuid"] for found in json.loads(done.stdout)["data"]] == ["job-1"]


def test_a_status_is_shown_with_its_checkpoints(job: Airflow, cli: Cli) -> None:
    done = cli("status", "job-1")
    assert done.exit_code == 0
    assert "in_progress" in done.stdout
    assert "models:/m-1[x]" in done.stdout
    assert json.loads(cli("status", "job-1", "--json").stdout)["status"] == "in_progress"


def test_a_status_tells_why_a_job_failed_and_what_it_used(job: Airflow, cli: Cli) -> None:
    job.runs.add(task(KEY, "failed", {"mlflow_run_id": "run-1"}))
    run = job.tracking.runs["run-1"]
    used = json.dumps({"device": "cpu", "seconds": 12.34567})
    tags = {"post_training.error": "row 2 is [bad]", "post_training.resources": used}
    job.tracking.runs["run-1"] = replace(run, status="FAILED", tags={**run.tags, **tags}, ended_at=NOW)
    done = cli("status", "job-1")
    assert done.exit_code == 0
    for word in ("failed", "row 2 is [bad]", "cpu", "12.35"):
        assert word in done.stdout


def test_checkpoints_are_listed_with_their_metrics(job: Airflow, cli: Cli) -> None:
    head, line = cli("artifacts", "job-1").stdout.splitlines()
    assert head.split("  ")[0] == "epoch"
    assert line.split()[:3] == ["0", "1.25", "3.5"]
    assert line.split()[-1] == "models:/m-1[x]"
    found = json.loads(cli("artifacts", "job-1", "--json").stdout)
    assert found["checkpoints"][0]["training_metrics"]["perplexity"] == 3.5


def test_a_job_is_cancelled_once(job: Airflow, cli: Cli) -> None:
    done = cli("cancel", "job-1")
    assert (done.exit_code, done.stdout) == (0, "job-1 is cancelled; its checkpoints so far are kept.\n")
    assert job.runs.tasks["job-1"].state == "failed"
    assert cli("cancel", "job-1").exit_code == 4


def test_a_cancel_is_told_as_json_too(job: Airflow, cli: Cli) -> None:
    done = cli("cancel", "job-1", "--json")
    assert json.loads(done.stdout) == {"job_uuid": "job-1", "status": "cancelled"}
    assert json.loads(cli("status", "job-1", "--json").stdout)["status"] == "cancelled"


@pytest.mark.parametrize("command", ["status", "logs", "artifacts", "cancel"])
def test_an_unknown_job_is_not_found(cli: Cli, command: str) -> None:
    done = cli(command, "nothing")
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == "error: no post-training job 'nothing'\n"


def test_a_record_that_is_away_is_unavailable(job: Airflow, cli: Cli) -> None:
    job.tracking.down = True
    done = cli("status", "job-1")
    assert done.exit_code == 5
    assert "503: MLflow does not answer" in done.stderr


def test_a_wrong_token_is_forbidden(airflow: Airflow, cli: Cli) -> None:
    assert cli("list", "--url", airflow.url, "--token", "wrong").exit_code == 6


def test_a_log_is_printed_page_by_page(job: Airflow, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_training.logs.MAX_PAGE_CHARACTERS", 2)
    job.runs.logs["job-1"] = [["a", "[b]", "c\u2028"]]
    assert cli("logs", "job-1").stdout == "a\n[b]\nc\u2028\n"
    assert cli("logs", "job-1", "--offset", 2).stdout == "c\u2028\n"
    found = json.loads(cli("logs", "job-1", "--json").stdout)
    assert found == {"job_uuid": "job-1", "log_lines": ["a", "[b]", "c\u2028"]}
    assert cli("logs", "job-1", "--offset", -1).exit_code == 2


@pytest.mark.parametrize(
    ("state", "code", "end"),
    [("success", 0, "job-1 is completed"), ("failed", 1, "job-1 is failed: The Airflow task ended without")],
)
def test_a_log_is_followed_to_the_end_of_the_job(
    airflow: Airflow, cli: Cli, state: str, code: int, end: str
) -> None:
    airflow.runs.add(task(KEY, state))
    airflow.runs.logs["job-1"] = [["a", "b"]]
    done = cli("logs", "-f", "job-1", "--offset", 1)
    assert done.exit_code == code
    assert done.stdout.startswith(f"b\n{end}")
    lines = [json.loads(line) for line in cli("logs", "-f", "job-1", "--json").stdout.splitlines()]
    assert lines[0]["log_lines"] == ["a", "b"]
    assert lines[-1]["status"] == ("completed" if state == "success" else "failed")


def test_an_api_that_goes_away_ends_the_following(
    job: Airflow, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object) -> object:
        raise RecordUnavailableError("the post-training API does not answer")

    monkeypatch.setattr("post_training.client.PostTrainingClient._log_events", unavailable)
    assert cli("logs", "-f", "job-1").exit_code == 5
