"""Stand-ins for Airflow, MLflow and the caller's rights, for tests of what lies between them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from post_training.airflow_runs import JobFilter, JobTask, Progress, RunExistsError
from post_training.dataset_records import DatasetFile, DatasetVersion, NewVersion
from post_training.errors import RecordUnavailableError
from post_training.job_ids import TaskKey, job_uuid_of
from post_training.run_reader import MAX_RUNS, Curve
from post_training.schemas.jobs import Checkpoint
from post_training.tracking import JobRun, TrackingServer, precedence

NOW = datetime(2026, 11, 24, tzinfo=UTC)


@dataclass
class FakeAccess:
    user_name: str = "somebody"
    read: bool = True
    trigger: bool = True
    cancel: bool = True
    logs: bool = True

    def may_read(self, dag_id: str) -> bool:
        return self.read

    def may_read_logs(self, dag_id: str) -> bool:
        return self.read and self.logs

    def may_trigger(self, dag_id: str) -> bool:
        return self.trigger

    def may_cancel(self, dag_id: str) -> bool:
        return self.cancel

    def may_retry(self, dag_id: str) -> bool:
        return self.cancel


@dataclass
class FakeRuns:
    tasks: dict[str, JobTask] = field(default_factory=dict)
    trigger_error: Exception | None = None
    appears_during_trigger: JobTask | None = None
    triggered: list[str] = field(default_factory=list)
    stopped: list[tuple[str, str]] = field(default_factory=list)
    of_tasks: dict[TaskKey, Progress] = field(default_factory=dict)
    of_runs: dict[tuple[str, str], Progress] = field(default_factory=dict)
    cancel_error: Exception | None = None
    logs: dict[str, list[list[str]]] = field(default_factory=dict)
    young_lines: int = 0
    down: bool = False
    asked_for: JobFilter | None = None

    def trigger(self, dag_id: str, run_id: str, conf: dict[str, Any], user_name: str | None) -> None:
        if self.appears_during_trigger is not None:
            self.add(self.appears_during_trigger)
            raise RunExistsError(run_id)
        if self.trigger_error is not None:
            raise self.trigger_error
        self.triggered.append(run_id)
        self.add(task(TaskKey(dag_id, run_id, "train"), None, conf))

    def add(self, task: JobTask) -> None:
        self.tasks[task.job_uuid] = task

    def find(self, job_uuid: str) -> JobTask | None:
        if self.down:
            raise RecordUnavailableError("Airflow's database is busy")
        return self.tasks.get(job_uuid)

    def find_task(self, key: TaskKey) -> JobTask | None:
        found = self.find(job_uuid_of(key))
        return found if found is not None and found.key == key else None

    def progress(self, key: TaskKey, *, of_run: bool = False) -> Progress | None:
        return self.of_runs.get((key.dag_id, key.run_id)) if of_run else self.of_tasks.get(key)

    def job_uuids(self, dag_ids: Collection[str]) -> list[str]:
        return [job_uuid_of(t.key) for t in reversed(self.tasks.values()) if t.key.dag_id in dag_ids]

    def page(self, wanted: JobFilter, offset: int, limit: int) -> tuple[list[JobTask], int]:
        if self.down:
            raise RecordUnavailableError("Airflow's database is busy")
        self.asked_for = wanted
        fitting = [
            t
            for t in reversed(self.tasks.values())
            if t.key.dag_id in wanted.dag_ids
            and wanted.run_id in (None, t.key.run_id)
            and wanted.text in t.job_uuid
        ]
        return fitting[offset : offset + limit], len(fitting)

    def dag_ids(self, *, prefix_of: str | None = None) -> set[str]:
        return {"supervised_fine_tune", "preference_optimize", *(t.key.dag_id for t in self.tasks.values())}

    def cancel(self, key: TaskKey, user_name: str) -> None:
        if self.cancel_error is not None:
            raise self.cancel_error
        job_uuid = job_uuid_of(key)
        self.tasks[job_uuid] = replace(self.tasks[job_uuid], state="failed")
        self.stopped.append((job_uuid, user_name))

    def was_stopped(self, task: JobTask) -> bool:
        return task.job_uuid in {job_uuid for job_uuid, _ in self.stopped}

    def log_lines(self, key: TaskKey, attempt: int, until: datetime | None = None) -> Iterator[str]:
        attempts = self.logs.get(job_uuid_of(key), [])
        lines = attempts[attempt - 1] if attempt <= len(attempts) else []
        yield from lines if until is None else lines[: len(lines) - self.young_lines]


@dataclass
class FakeTracking:
    runs: dict[str, JobRun] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    statuses: list[str] = field(default_factory=list)
    made: list[Checkpoint] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    created: int = 0
    down: bool = False
    asked: bool = False
    server: TrackingServer = field(default_factory=lambda: TrackingServer("http://mlflow"))
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[tuple[str, str], Curve] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def create_run(
        self,
        *,
        name: str,
        experiment: str | None,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        request: dict[str, Any],
    ) -> JobRun:
        self._answer()
        self.created += 1
        made = NOW + timedelta(seconds=self.created)
        written = {key: str(value) for key, value in params.items()}
        run = JobRun(f"run-{self.created}", "1", "SCHEDULED", made, None, dict(tags), {}, written)
        self.runs[run.run_id] = run
        self.requests[run.run_id] = request
        return run

    def discard(self, run_id: str) -> None:
        self._answer()
        del self.runs[run_id]

    def find(self, job_uuid: str) -> JobRun | None:
        self._answer()
        found = [run for run in self.runs.values() if run.tags.get("post_training.job_uuid") == job_uuid]
        return max(found, key=precedence, default=None)

    def successor(self, run_id: str) -> JobRun | None:
        self._answer()
        runs = reversed(self.runs.values())
        return next((run for run in runs if run.tags.get("post_training.supersedes") == run_id), None)

    def get(self, run_id: str) -> JobRun | None:
        self._answer()
        return self.runs.get(run_id)

    def set_status(
        self, run_id: str, status: str, *, error: str | None = None, ended_at: datetime | None = None
    ) -> None:
        self._answer()
        self.statuses.append(status)
        run = self.runs[run_id]
        tags = {**run.tags, **({"post_training.error": error} if error else {})}
        ended = (ended_at or NOW) if status in ("FINISHED", "FAILED", "KILLED") else None
        self.runs[run_id] = replace(run, status=status, tags=tags, ended_at=ended)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._answer()
        run = self.runs[run_id]
        self.runs[run_id] = replace(run, tags={**run.tags, **tags})

    def forget_state(self, run_id: str) -> None:
        self._answer()
        self.forgotten.append(run_id)

    def unsettled_runs(self, killed_since: datetime) -> list[JobRun]:
        self._answer()
        return [run for run in self.runs.values() if run.status in ("SCHEDULED", "RUNNING", "KILLED")]

    def add_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        self._answer()
        self.params.update(params)

    def add_file(self, run_id: str, path: Path, folder: str) -> None:
        self._answer()
        self.files[f"{folder}/{path.name}"] = path.read_text()

    def checkpoints(self, run: JobRun) -> list[Checkpoint]:
        self._answer()
        return self.made

    def _answer(self) -> None:
        self.asked = True
        if self.down:
            raise RecordUnavailableError("MLflow does not answer")


@dataclass
class FakeReader:
    """Of a FakeTracking's runs; its calls are noted there."""

    tracking: FakeTracking

    def by_id(self, run_ids: Collection[str]) -> list[JobRun]:
        self._called("by_id")
        return [self.tracking.runs[run_id] for run_id in run_ids if run_id in self.tracking.runs]

    def of_dag(self, dag_id: str, since: datetime, until: datetime) -> list[JobRun]:
        self._called(f"of_dag {dag_id}")
        found = [
            run
            for run in self.tracking.runs.values()
            if run.tags.get("airflow.dag_id") == dag_id and since <= run.created_at <= until
        ]
        return found[-MAX_RUNS:]

    def curves(self, run_ids: Sequence[str], metric: str, points: int) -> dict[str, Curve]:
        self._called(f"curves {metric}")
        curves = self.tracking.curves
        return {run_id: curves[run_id, metric] for run_id in run_ids if (run_id, metric) in curves}

    def request(self, run: JobRun) -> dict[str, Any]:
        self._called("request")
        return self.tracking.requests[run.run_id]

    def _called(self, what: str) -> None:
        self.tracking._answer()
        self.tracking.calls.append(what)


@dataclass
class FakeDatasetRecords:
    versions: list[DatasetVersion] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    down: bool = False

    def add(self, new: NewVersion) -> DatasetVersion:
        self._answer()
        run_id, uri = f"run-{len(self.versions) + 1}", str(new.content)
        if isinstance(new.content, DatasetFile):
            self.files[run_id], uri = new.content.content, f"runs:/{run_id}/{new.content.name}"
        about = (new.dataset_id, new.digest, new.purpose, new.type, new.metadata)
        self.versions.append(DatasetVersion(run_id, *about, uri, NOW))
        return self.versions[-1]

    def find(self, dataset_id: str, digest: str | None = None) -> DatasetVersion | None:
        self._answer()
        return next(
            (
                version
                for version in reversed(self.versions)
                if version.dataset_id == dataset_id and version.digest.startswith(digest or "")
            ),
            None,
        )

    def current(self) -> list[DatasetVersion]:
        self._answer()
        newest = {version.dataset_id: version for version in self.versions}
        return list(reversed(newest.values()))

    def rows(self, version: DatasetVersion) -> list[dict[str, Any]]:
        self._answer()
        return [json.loads(line) for line in self.files[version.run_id].splitlines()]

    def delete(self, dataset_id: str) -> bool:
        found = self.find(dataset_id) is not None
        self.versions = [version for version in self.versions if version.dataset_id != dataset_id]
        return found

    def _answer(self) -> None:
        if self.down:
            raise RecordUnavailableError("MLflow does not answer")


def task(key: TaskKey, state: str | None, conf: Mapping[str, Any] | None = None) -> JobTask:
    """Return a task that was scheduled, and has ended where its state says so."""
    ended = NOW if state in ("success", "failed") else None
    return JobTask(key, state, 1, NOW, NOW if state else None, ended, "attempt-1", conf or {})
