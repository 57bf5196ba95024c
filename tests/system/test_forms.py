"""Airflow's own pages: its trigger form starts a job or refuses a value, and a task's links lead on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.system.browser import Visits, visiting
from tests.system.conftest import Deployment

pytestmark = pytest.mark.system

JOB_MS = 900_000
N_EPOCHS = "training_config.n_epochs"


@pytest.fixture(scope="module")
def visits(deployment: Deployment) -> Iterator[Visits]:
    with visiting(deployment) as visits:
        yield visits


def trigger_form(page: Page, deployment: Deployment) -> Locator:
    """Open the form of the DAG that fine-tunes."""
    page.goto(f"{deployment.servers.airflow_url}/dags/supervised_fine_tune")
    page.get_by_test_id("trigger-dag-button").click()
    return page.get_by_role("dialog")


def fill(form: Locator, section: str, values: dict[str, str]) -> None:
    """Fill fields of one section; Airflow shows one at a time."""
    head = form.get_by_role("button", name=section, exact=True)
    if head.get_attribute("aria-expanded") != "true":
        head.click()
    for path, value in values.items():
        control = form.locator(f"[name='element_{path}']")
        control.fill(value)
        control.blur()


def test_a_job_is_started_by_airflows_form_and_its_task_leads_on(
    deployment: Deployment, visits: Visits
) -> None:
    with visits.page() as page:
        form = trigger_form(page, deployment)
        fill(form, "Model", {"model": str(deployment.model)})
        rows = str(deployment.data / "train.jsonl")
        fill(form, "Data", {"training_config.data_config.dataset_id": rows})
        expect(form.get_by_text("Rows to train on: a registered id")).to_be_visible()
        fill(form, "Training", {N_EPOCHS: "2"})
        form.get_by_role("button", name="Advanced Options").click()
        form.locator("[name='dagRunId']").fill("from-airflows-form")
        form.get_by_role("button", name="Trigger").click()
        expect(form).to_have_count(0)
        assert deployment.wait("from-airflows-form").status == "completed"

        page.goto(visits.url("?text=from-airflows"))
        expect(page.locator("#jobs tbody tr")).to_contain_text("Completed")
        leads_on(page, deployment, "from-airflows-form")


def leads_on(page: Page, deployment: Deployment, job_uuid: str) -> None:
    """Follow every link of a completed job's task."""
    task = f"{deployment.servers.airflow_url}/dags/supervised_fine_tune/runs/{job_uuid}/tasks/train/details"
    (run,) = deployment.runs_of(job_uuid)
    shown = {"MLflow run": str(run.info.run_name), "Checkpoint": "adapter_model.safetensors"}
    for name, content in shown.items():
        page.goto(task)
        with page.context.expect_page() as opened:
            page.get_by_role("link", name=name, exact=True).click()
        expect(opened.value.get_by_text(content).first).to_be_visible(timeout=JOB_MS)
        opened.value.close()
    page.get_by_role("link", name="Job", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(job_uuid)
    expect(page.locator("#checkpoints tbody tr")).to_have_count(2)


def test_a_wrong_value_is_refused_with_its_fields_name(deployment: Deployment, visits: Visits) -> None:
    """What is missing keeps the form from being sent; what only a worker can know fails the task at once."""
    with visits.page() as page:
        form = trigger_form(page, deployment)
        fill(form, "Model", {"model": str(deployment.model)})
        form.get_by_role("button", name="Data", exact=True).click()
        expect(form.get_by_text("This field is required")).to_be_visible()
        submit = form.get_by_role("button", name="Trigger")
        expect(submit).to_be_disabled()
        fill(form, "Data", {"training_config.data_config.dataset_id": "missing.jsonl"})
        form.get_by_role("button", name="Advanced Options").click()
        form.locator("[name='dagRunId']").fill("refused-by-its-task")
        submit.click()
        expect(form).to_have_count(0)
        status = deployment.wait("refused-by-its-task")
        assert status.status == "failed"
        page.goto(visits.url("job?job_uuid=refused-by-its-task"))
        reason = page.get_by_text("training_config.data_config.dataset_id").first
        expect(reason).to_contain_text("missing.jsonl")
    with deployment.http() as http:
        path = "/api/v2/dags/supervised_fine_tune/dagRuns"
        task = http.get(f"{path}/refused-by-its-task/taskInstances/train").json()
        wrong = {"training_config.data_config.dataset_id": "missing.jsonl", N_EPOCHS: 0}
        answer = http.post(path, json={"conf": wrong, "logical_date": None})
    assert task["try_number"] == 1, "another attempt would fail the same way"
    assert answer.status_code == 400
    assert f"{N_EPOCHS}: 0 is less than the minimum of 1" in answer.text
