"""A job's id and its place in Airflow."""

from __future__ import annotations

from datetime import datetime

import pytest

from post_training.job_ids import TaskKey, candidate_keys, job_uuid_of, new_job_uuid, request_dag
from post_training.schemas.requests import REQUESTS, check_job_uuid


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("search", [False, True])
def test_in_a_request_dag_the_run_is_the_job(method: str, search: bool) -> None:
    dag_id = request_dag(method, search=search)
    assert dag_id == (f"{method}_search" if search else method)
    assert job_uuid_of(TaskKey(dag_id, "my-job", "train")) == "my-job"


@pytest.mark.parametrize(
    "key",
    [
        TaskKey("nightly", "manual__2026-11-24T00:00:00.5+00:00", "sft"),
        TaskKey("team.nightly", "run.1", "group.sft"),
        TaskKey("nightly", "run", "sft", 3),
    ],
)
def test_elsewhere_the_id_leads_back_to_the_task(key: TaskKey) -> None:
    assert key in list(candidate_keys(job_uuid_of(key), {"nightly", "team.nightly", "team"}))


def test_ids_of_mapped_tasks_differ() -> None:
    assert job_uuid_of(TaskKey("d", "r", "t", 0)) == "d.r.t.0"
    assert job_uuid_of(TaskKey("d", "r", "t")) == "d.r.t"
    assert list(candidate_keys("plain-id", {"plain-id"})) == []


@pytest.mark.parametrize(
    ("index", "map_indexes"),
    [
        ("0", {-1, 0}),
        ("2147483647", {-1, 2147483647}),
        ("2147483648", {-1}),
        ("9" * 5000, {-1}),
        ("00", {-1}),
        ("-1", {-1}),
        ("\N{ARABIC-INDIC DIGIT THREE}", {-1}),
    ],
)
def test_only_an_index_as_the_id_writes_it_is_one(index: str, map_indexes: set[int]) -> None:
    assert {key.map_index for key in candidate_keys(f"d.r.t.{index}", {"d"})} == map_indexes


def test_only_known_dags_are_looked_at_and_the_work_grows_with_the_length() -> None:
    assert list(candidate_keys("nightly.run.sft", {"other", "supervised_fine_tune"})) == []
    assert len(list(candidate_keys("d." + ".".join("1" * 400), {"d"}))) < 900


def test_two_jobs_of_one_second_have_ids_of_their_own() -> None:
    first, second = (new_job_uuid("lora", datetime(2026, 11, 29, 8)) for _ in range(2))
    assert first != second
    assert first.startswith("lora-20261129-080000-")
    assert check_job_uuid(first) == first
