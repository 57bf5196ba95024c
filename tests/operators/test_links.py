"""The links of a task's page: noted while the task runs, and again as Airflow stores them at its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time.comms import ErrorResponse

from post_training.operators.links import CheckpointLink, JobLink
from post_training.operators.search import PlanSearchOperator
from post_training.operators.training import SupervisedFineTuneOperator
from post_training.schemas.jobs import Checkpoint
from post_training_plugin import PostTrainingPlugin
from tests.fakes import NOW
from tests.operators.workplace import RESULT, Workplace

RUN = "http://mlflow/#/experiments/1/runs/run-1"
WAITS = """
for _ in range(600):
    if Path({mark!r}).exists(): break
    time.sleep(0.1)
else: sys.exit(1)
"""


def checkpoint(epoch: int, path: str) -> Checkpoint:
    return Checkpoint(
        identifier=f"job-1-{epoch}",
        created_at=NOW,
        epoch=epoch,
        post_training_job_id="job-1",
        path=path,
        training_metrics=None,
    )


def stored(operator: BaseOperator, ti: Any) -> dict[str, str]:
    """What Airflow stores when an attempt ends."""
    return {link.name: link.get_link(operator, ti_key=ti) for link in operator.operator_extra_links}


def place(**changes: Any) -> Any:
    of_job = {"dag_id": "nightly", "run_id": "a/b&c", "task_id": "train", "map_index": -1}
    return SimpleNamespace(**{**of_job, **changes})


@pytest.mark.parametrize(
    ("changes", "job_uuid"),
    [
        ({}, "nightly.a%2Fb%26c.train"),
        ({"map_index": None}, "nightly.a%2Fb%26c.train"),
        ({"map_index": 2}, "nightly.a%2Fb%26c.train.2"),
        ({"dag_id": "preference_optimize", "run_id": "job-1"}, "job-1"),
    ],
)
def test_a_task_leads_to_the_page_of_its_job(changes: dict[str, Any], job_uuid: str) -> None:
    operator = SupervisedFineTuneOperator(task_id="train")
    url = JobLink().get_link(operator, ti_key=place(**changes))
    assert url == f"post-training/ui/job?job_uuid={job_uuid}"
    assert url.startswith(str(PostTrainingPlugin.external_views[0]["href"])), "where the page is"


def test_the_tasks_of_a_search_lead_to_the_page_of_the_job_that_they_search_for() -> None:
    operator = PlanSearchOperator(task_id="tune_trials", method="supervised_fine_tune", job_task_id="tune")
    url = JobLink().get_link(operator, ti_key=place(run_id="night", task_id="tune_trials", map_index=3))
    assert url == "post-training/ui/job?job_uuid=nightly.night.tune"


def test_a_running_task_leads_to_what_there_is(workplace: Workplace) -> None:
    """The trainer goes on only when Airflow has the link to what it has uploaded."""
    mark = workplace.data.parent / "noted"
    workplace.trains(
        f"print('INFO checkpoint in MLflow: models:/m-1')\n"
        f"{WAITS.format(mark=str(mark))}\nresult = {RESULT!r}"
    )
    operator, context = workplace.operator(), workplace.context()
    seen: dict[str, str] = {}

    def note(key: str, value: str) -> None:
        seen[key] = value
        if key == CheckpointLink().xcom_key:
            assert seen["_link_MLflowRunLink"] == RUN
            mark.touch()

    context["ti"].xcom_push = note
    operator.execute(context)
    assert list(seen) == ["_link_JobLink", "_link_MLflowRunLink", "_link_CheckpointLink"]
    assert stored(operator, context["ti"]) == {
        "Job": "post-training/ui/job?job_uuid=job-1",
        "MLflow run": RUN,
        "Checkpoint": "http://mlflow/#/experiments/1/models/m-1/artifacts",
    }


def test_a_completed_task_leads_to_the_newest_checkpoint(workplace: Workplace) -> None:
    made = [checkpoint(1, "models:/m-2"), checkpoint(0, "models:/m-1")]
    result = {**RESULT, "checkpoints": [one.model_dump(mode="json") for one in made]}
    workplace.trains(f"result = {result!r}")
    operator = workplace.operator()
    operator.execute(workplace.context())
    assert workplace.links["_link_CheckpointLink"].endswith("/models/m-2/artifacts")


def test_checkpoints_that_mlflow_does_not_have_are_no_page(workplace: Workplace) -> None:
    made = [checkpoint(0, "/srv/checkpoints/job-1/epoch-0").model_dump(mode="json")]
    workplace.trains(f"result = { ({**RESULT, 'checkpoints': made})!r}")
    operator, context = workplace.operator(), workplace.context()
    operator.execute(context)
    assert "_link_CheckpointLink" not in workplace.links
    assert stored(operator, context["ti"])["Checkpoint"] == "", "Airflow shows no button for it"


def test_a_retry_leads_to_the_checkpoints_of_the_attempt_before(workplace: Workplace) -> None:
    workplace.fails("result = {'status': 'failed', 'error': 'once more'}", max_tries=1)
    assert "_link_CheckpointLink" not in workplace.links
    workplace.tracking.made = [checkpoint(0, "models:/m-1")]
    workplace.links.clear()  # as Airflow does before it tries again
    workplace.trains("result = {'status': 'failed', 'error': 'no more'}")
    operator, context = workplace.operator(), workplace.context(attempt=2, max_tries=1)
    with pytest.raises(AirflowException, match="no more"):
        operator.execute(context)
    assert workplace.links["_link_CheckpointLink"].endswith("/models/m-1/artifacts")
    assert stored(operator, context["ti"])["Checkpoint"].endswith("/models/m-1/artifacts")


def test_a_refused_task_leads_to_its_job_and_its_run(workplace: Workplace) -> None:
    operator, context = workplace.operator(training_config={"n_epochs": 0}), workplace.context()
    with pytest.raises(AirflowException, match="training_config"):
        operator.execute(context)
    assert stored(operator, context["ti"]) == {
        "Job": "post-training/ui/job?job_uuid=job-1",
        "MLflow run": RUN,
        "Checkpoint": "",
    }


def test_training_goes_on_where_airflow_does_not_keep_a_link(workplace: Workplace) -> None:
    workplace.trains(f"print('INFO checkpoint in MLflow: models:/m-1'); result = {RESULT!r}")
    operator, context = workplace.operator(), workplace.context()

    def refuse(key: str, value: str) -> None:
        if key == CheckpointLink().xcom_key:
            raise AirflowRuntimeError(ErrorResponse(error=ErrorType.API_SERVER_ERROR))

    context["ti"].xcom_push = refuse
    assert operator.execute(context)["metrics"] == RESULT["metrics"]
