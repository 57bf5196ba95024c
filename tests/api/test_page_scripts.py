"""The page's scripts in a real browser, against the app over fakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
from playwright.sync_api import Browser, Page, expect

from post_training.api.capacity import Capacity, Places
from post_training.job_ids import TaskKey
from post_training.schemas.jobs import Checkpoint
from tests.api.conftest import Deployment
from tests.api.server import Server
from tests.chromium import PAGE_SECONDS, chromium
from tests.fakes import NOW, task
from tests.requests_of import sft_body

SHOWN_LINES = 5000
STATUSES = {"running": "RUNNING", "success": "FINISHED"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@contextmanager
def opened(
    browser: Browser, deployment: Deployment, path: str, capacity: Capacity | None = None
) -> Iterator[Page]:
    """Serve the app, and open one of the page's documents as its admin."""
    with Server(deployment, capacity or Capacity()) as server:
        context = browser.new_context(extra_http_headers={"Authorization": "Bearer admin"})
        context.set_default_timeout(PAGE_SECONDS * 1000)
        context.add_init_script("delete Navigator.prototype.clipboard")  # as on plain HTTP
        page = context.new_page()
        try:
            page.goto(f"{server.url}/post-training/ui/{path}")
            yield page
        finally:
            context.close()


def add_job(
    deployment: Deployment,
    job_uuid: str = "job-1",
    state: str = "running",
    losses: dict[int, float] | None = None,
) -> None:
    """Let a LoRA job be there, with its training losses by step."""
    body = sft_body(job_uuid=job_uuid)
    assert deployment.client().post("/v1/post-training/supervised-fine-tune", json=body).status_code == 200
    submitted = deployment.runs.tasks[job_uuid]
    deployment.runs.add(task(submitted.key, state, submitted.conf))
    run_id = f"run-{deployment.tracking.created}"
    deployment.tracking.set_status(run_id, STATUSES[state])
    if losses:
        run = deployment.tracking.runs[run_id]
        deployment.tracking.runs[run_id] = replace(run, metrics={"train_loss": list(losses.values())[-1]})
        deployment.tracking.curves[run_id, "train_loss"] = (list(losses), list(losses.values()))


def checkpoint(epoch: int) -> Checkpoint:
    return Checkpoint(
        identifier=f"job-1-{epoch}",
        created_at=NOW + timedelta(minutes=epoch),
        epoch=epoch,
        post_training_job_id="job-1",
        path=f"models:/m-{epoch}",
    )


def test_the_newest_lines_of_a_long_log_are_shown(browser: Browser, deployment: Deployment) -> None:
    add_job(deployment)
    lines = [f"line {number}" for number in range(10_003)]
    deployment.runs.logs["job-1"] = [lines]
    with opened(browser, deployment, "job?job_uuid=job-1") as page:
        log = page.locator("#log pre")
        expect(log).to_contain_text("line 10002\n")
        assert (log.text_content() or "").splitlines() == lines[-SHOWN_LINES:]
        lines.append("one more")
        expect(log).to_contain_text("one more\n")
        assert (log.text_content() or "").splitlines() == lines[-SHOWN_LINES:]
        expect(page.get_by_text("Only the last 5000 lines are shown here.")).to_be_visible()


def test_why_a_log_is_not_followed_is_said(browser: Browser, deployment: Deployment) -> None:
    add_job(deployment)
    full = Capacity(followers=Places(0, of_one_user=0))
    with opened(browser, deployment, "job?job_uuid=job-1", full) as page:
        expect(page.locator("#log [role=status]")).to_have_text(
            "0 clients follow logs, which is as many as may."
        )


def test_an_open_snippet_stays_and_keeps_the_focus_while_checkpoints_come(
    browser: Browser, deployment: Deployment
) -> None:
    add_job(deployment)
    deployment.tracking.made = [checkpoint(0)]
    with opened(browser, deployment, "job?job_uuid=job-1") as page:
        page.get_by_text("Python").click()
        copy = page.get_by_role("button", name="Copy")
        copy.click()
        expect(page.locator("#checkpoints")).to_contain_text("Copied")
        expect(page.locator("#checkpoints button").first).to_be_focused()
        code = page.locator("#checkpoints pre").first.inner_text()
        assert page.evaluate("getSelection().toString()") == code
        assert code.splitlines()[2:5] == [
            'mlflow.set_tracking_uri("http://mlflow")',
            '# The base lies where the trainer had it; elsewhere add base_model_path="FOLDER".',
            'chat = mlflow.transformers.load_model("models:/m-0")',
        ]
        deployment.tracking.made = [checkpoint(0), checkpoint(1)]
        deployment.callers["admin"].cancel = False
        expect(page.locator("#checkpoints tbody tr")).to_have_count(2)
        expect(page.get_by_role("button", name="Cancel job")).to_have_count(0)
        deployment.tracking.down = True
        expect(page.locator("#notice")).to_have_text("MLflow does not answer.")
        expect(page.locator("#checkpoints tbody tr")).to_have_count(2)
        expect(page.locator("#checkpoints details").first).to_have_attribute("open", "")
        expect(page.locator("#checkpoints button").first).to_be_focused()


def test_what_is_typed_stays_when_the_method_changes(browser: Browser, deployment: Deployment) -> None:
    with opened(browser, deployment, "new") as page:
        typed = {
            "job_uuid": "mine",
            "model": "org/model",
            "training_config.data_config.dataset_id": "rows.jsonl",
            "training_config.n_epochs": "7",
        }
        for path, value in typed.items():
            page.locator(f"[name='{path}']").fill(value)
        page.locator("[name='training_config.data_config.data_format']").select_option("dialog")
        page.get_by_label("Preference optimization (DPO)").check()
        expect(page.locator("[name='finetuned_model']")).to_have_value("")
        expect(page.locator("[name='job_uuid']")).to_have_value("mine")
        expect(page.locator("[name='training_config.n_epochs']")).to_have_value("7")
        expect(page.locator("[name='training_config.data_config.data_format']")).to_have_value('"dialog"')
        page.get_by_label("Supervised fine-tuning").check()
        for path, value in typed.items():
            expect(page.locator(f"[name='{path}']")).to_have_value(value)


def test_every_refused_field_is_shown(browser: Browser, deployment: Deployment) -> None:
    add_job(deployment)
    with opened(browser, deployment, "new") as page:
        page.locator("[name='model']").fill("org/model")
        page.locator("[name='training_config.data_config.dataset_id']").fill("rows.jsonl")
        page.locator("[name='training_config.data_config.batch_size']").fill("1")
        page.locator("[name='training_config.n_epochs']").fill("1")
        sections = page.locator("details", has=page.locator("[aria-invalid]"))
        for name in ("runtime.seed", "training_config.optimizer_config.lr"):
            assert not page.locator(f"[name='{name}']").is_visible()
            page.locator(f"[name='{name}']").evaluate("control => (control.value = 'what')")
        page.get_by_role("button", name="Start job").click()
        expect(page.locator("[id='field-runtime.seed-error']")).to_be_visible()
        expect(page.locator("[id='field-training_config.optimizer_config.lr-error']")).to_be_visible()
        expect(sections).to_have_count(2)
        for name in ("runtime.seed", "training_config.optimizer_config.lr"):
            page.locator(f"[name='{name}']").fill("")
        page.locator("[name='job_uuid']").fill("job-1")
        page.get_by_role("button", name="Start job").click()
        expect(page.locator("[id='field-job_uuid-error']")).to_contain_text(
            "belongs to a job with another request"
        )
        expect(page.locator("[name='job_uuid']")).to_be_focused()


def test_jobs_are_compared_beside_one_that_cannot_be_read(browser: Browser, deployment: Deployment) -> None:
    add_job(deployment, "short", "success", {1: 4.0, 2: 3.0})
    add_job(deployment, "long", "success", {1: 5.0, 4: 2.0, 5: 1.0})
    with opened(browser, deployment, "compare?jobs=short,gone,long,short") as page:
        expect(page.locator("#jobs tbody tr")).to_have_count(2)
        expect(page.locator("#notice")).to_have_text("gone: There is no such job, or you may not see it.")
        legend = page.locator("figure .legend")
        expect(legend).to_have_text("short · training 3long · training 1step 5")
        plot = page.locator("figure .u-over")
        box = plot.bounding_box()
        assert box is not None
        plot.hover(position={"x": box["width"] * 0.7, "y": box["height"] / 2})
        expect(legend).to_have_text("short · training 3long · training 2step 4")


def test_a_search_is_repeated_less_often_than_the_list(browser: Browser, deployment: Deployment) -> None:
    add_job(deployment)
    asked: list[str] = []
    with opened(browser, deployment, "new") as page:
        page.clock.install()
        page.on("request", lambda request: asked.append(request.url) if "data/jobs" in request.url else None)
        page.goto(page.url.replace("/new", "/?text=job"))
        expect(page.locator("#jobs tbody tr")).to_have_count(1)
        page.clock.run_for(14_000)
        with page.expect_request("**/data/jobs?**"):
            page.clock.run_for(2_000)
        assert len(asked) == 2


def test_a_model_that_nobody_knows_is_not_said_to_be_the_default(
    browser: Browser, deployment: Deployment
) -> None:
    deployment.runs.add(task(TaskKey("nightly", "night", "sft"), "running"))
    with opened(browser, deployment, "") as page:
        cells = page.locator("#jobs td[data-label=Model]")
        expect(cells).to_have_text(["–"])
