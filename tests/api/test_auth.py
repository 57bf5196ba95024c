"""The caller's rights by Airflow's own auth manager, with teams in a real metadata database."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser

from post_training.api.auth import AirflowAccess
from post_training.errors import JobNotFoundError
from post_training.job_ids import TaskKey
from post_training.jobs import JobService
from tests.fakes import FakeRuns, FakeTracking, task
from tests.test_jobs import Accepting

MAY = ("may_read", "may_read_logs", "may_trigger", "may_cancel", "may_retry")


@pytest.fixture(scope="module", autouse=True)
def _dags_of_two_teams() -> None:
    """The DAGs ``of_red`` and ``of_blue``, each in a bundle of its team, and ``of_nobody``."""
    from airflow.models.dag import DagModel
    from airflow.models.dagbundle import DagBundleModel
    from airflow.models.team import Team
    from airflow.utils.db import initdb
    from airflow.utils.session import create_session

    initdb()
    with create_session() as session:
        for name in ("red", "blue", "nobody"):
            teams = [] if name == "nobody" else [Team(name=name)]
            session.add(DagBundleModel(name=f"bundle_{name}"))
            session.flush()
            session.get(DagBundleModel, f"bundle_{name}").teams = teams
            session.add(DagModel(dag_id=f"of_{name}", bundle_name=f"bundle_{name}"))


@pytest.fixture(autouse=True)
def _simple_auth_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("post_training.api.auth.get_auth_manager", SimpleAuthManager)


def access(role: str, *teams: str) -> AirflowAccess:
    return AirflowAccess(SimpleAuthManagerUser(username="somebody", role=role, teams=list(teams)))


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        ("viewer", {"may_read", "may_read_logs"}),
        ("user", set(MAY)),
        ("op", set(MAY)),
        ("admin", set(MAY)),
    ],
)
def test_roles(role: str, allowed: set[str]) -> None:
    caller = access(role)
    assert {name for name in MAY if getattr(caller, name)("of_nobody")} == allowed


@pytest.mark.parametrize("role", ["viewer", "user", "op"])
def test_a_dag_of_another_team_is_out_of_reach(role: str) -> None:
    caller = access(role, "red")
    assert caller.may_read("of_red")
    assert not any(getattr(caller, name)("of_blue") for name in MAY)


def test_a_team_sees_the_jobs_of_its_own_dags_alone() -> None:
    runs = FakeRuns()
    for team in ("red", "blue"):
        runs.add(task(TaskKey(f"of_{team}", "run", "sft"), "success"))
    tracking: Any = FakeTracking()
    service = JobService(runs, lambda: tracking, Accepting())  # type: ignore[arg-type]
    assert [job.job_uuid for job in service.list(access("user", "red")).data] == ["of_red.run.sft"]
    assert len(service.list(access("admin")).data) == 2
    assert service.artifacts("of_red.run.sft", access("viewer", "red")).checkpoints == []
    for refused in (service.status, service.artifacts, service.cancel):
        with pytest.raises(JobNotFoundError):
            refused("of_blue.run.sft", access("user", "red"))
