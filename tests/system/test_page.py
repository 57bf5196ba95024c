"""The page in Airflow, in a real browser against the real servers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import FrameLocator, Page, expect

from tests.system.browser import NARROW, WIDE, Visits, visiting
from tests.system.conftest import Deployment
from tests.system.test_algorithms import long_form
from tests.waiting import wait_until

pytestmark = pytest.mark.system

TRAINING_MS = 900_000
GRAVE = ("serious", "critical")


@pytest.fixture(scope="module")
def visits(deployment: Deployment) -> Iterator[Visits]:
    with visiting(deployment) as visits:
        yield visits


@pytest.fixture(autouse=True)
def _nothing_goes_wrong_in_our_scripts(visits: Visits) -> Iterator[None]:
    visits.problems.clear()
    yield
    assert visits.problems == []


def in_airflow(page: Page) -> FrameLocator:
    return page.frame_locator("iframe[title='Post-training']")


def fill(form: FrameLocator | Page, deployment: Deployment, job_uuid: str, n_epochs: int) -> None:
    """Fill the form for a small job."""
    values = {
        "job_uuid": job_uuid,
        "model": str(deployment.model),
        "training_config.data_config.dataset_id": str(deployment.data / "train.jsonl"),
        "training_config.data_config.batch_size": "2",
        "training_config.n_epochs": str(n_epochs),
        "training_config.max_validation_steps": "1",
    }
    for path, value in values.items():
        form.locator(f"[name='{path}']").fill(value)


def test_a_job_is_started_watched_cancelled_and_cloned(deployment: Deployment, visits: Visits) -> None:
    with visits.page(user="") as page:
        page.goto(f"{deployment.servers.airflow_url}/plugin/post-training")
        page.get_by_label("Username").fill("admin")
        page.get_by_label("Password", exact=True).fill(deployment.servers.password())
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Post-training").first.wait_for()
        if "/plugin/" not in page.url:
            page.goto(f"{deployment.servers.airflow_url}/plugin/post-training")
        ours = in_airflow(page)
        ours.get_by_role("link", name="New job").click()
        fill(ours, deployment, "from-the-page", n_epochs=80)
        ours.get_by_role("button", name="Start job").click()

        expect(ours.get_by_role("heading", name="from-the-page")).to_be_visible()
        progress = ours.locator("#summary progress")
        progress.wait_for(timeout=TRAINING_MS)
        seen = progress.get_attribute("value")
        expect(progress).not_to_have_attribute("value", str(seen), timeout=TRAINING_MS)
        expect(ours.locator("figure", has_text="Loss").locator("canvas").first).to_be_visible()
        expect(ours.locator("#log pre")).to_contain_text("step ", timeout=TRAINING_MS)
        length = len(ours.locator("#log pre").inner_text())
        wait_until(lambda: len(ours.locator("#log pre").inner_text()) > length)

        ours.get_by_role("button", name="Cancel job").click()
        ours.get_by_role("dialog").get_by_role("button", name="Cancel job").click()
        expect(ours.locator("#badge")).to_have_text("Cancelled", timeout=TRAINING_MS)
        expect(ours.get_by_role("button", name="Cancel job")).to_have_count(0)
        expect(ours.get_by_role("button", name="Retry")).to_be_visible()
        deployment.wait("from-the-page", "cancelled")

        ours.get_by_role("link", name="Clone").click()
        expect(ours.locator("[name='training_config.n_epochs']")).to_have_value("80")
        ours.locator("[name='job_uuid']").fill("cloned")
        ours.locator("[name='training_config.n_epochs']").fill("2")
        ours.get_by_role("button", name="Start job").click()
        expect(ours.locator("#badge")).to_have_text("Completed", timeout=TRAINING_MS)
        expect(ours.locator("#checkpoints tbody tr")).to_have_count(2)
        expect(ours.locator("#log")).to_contain_text("The log is complete", timeout=TRAINING_MS)


@pytest.fixture(scope="module")
def two_jobs(deployment: Deployment) -> list[str]:
    """Two jobs that have completed, with different params."""
    client = deployment.client()
    names = ["page-one", "page-two"]
    for name, epochs in zip(names, (2, 3), strict=True):
        body = deployment.body(name, n_epochs=epochs)
        client.post_training.supervised_fine_tune(**body)
    for name in names:
        assert deployment.wait(name).status == "completed"
    return names


def test_a_cancelled_job_is_retried(deployment: Deployment, visits: Visits) -> None:
    body = deployment.body("retried", n_epochs=5)
    deployment.client().post_training.supervised_fine_tune(**body)
    deployment.wait("retried", "in_progress")
    deployment.client().post_training.job.cancel(job_uuid="retried")
    with visits.page() as page:
        page.goto(visits.url("job?job_uuid=retried"))
        page.get_by_role("button", name="Retry").click()
        expect(page.locator("#badge")).to_have_text(re.compile("Scheduled|In progress|Completed"))
        expect(page.locator("#badge")).to_have_text("Completed", timeout=TRAINING_MS)


def test_jobs_are_found_and_compared(two_jobs: list[str], visits: Visits) -> None:
    with visits.page() as page:
        page.goto(visits.url())
        page.get_by_role("searchbox").fill("page-")
        expect(page.locator("#jobs tbody tr")).to_have_count(2)
        page.get_by_label("Status").select_option("failed")
        expect(page.locator("#jobs")).to_contain_text("No job matches this search.")
        page.get_by_label("Status").select_option("completed")
        for name in two_jobs:
            page.get_by_label(f"Compare {name}").check()
        page.get_by_role("link", name="Compare 2").click()
        params = page.locator("#params")
        expect(params.get_by_text("training_config.n_epochs")).to_be_visible()
        assert "runtime.seed" not in params.inner_text()
        loss = page.locator("figure", has_text="Loss").first
        expect(loss).to_contain_text("page-one")
        expect(loss).to_contain_text("page-two")


def test_links_lead_out_of_airflows_frame(
    deployment: Deployment, two_jobs: list[str], visits: Visits
) -> None:
    with visits.page() as page:
        page.goto(f"{deployment.servers.airflow_url}/plugin/post-training")
        ours = in_airflow(page)
        ours.get_by_role("link", name=two_jobs[0], exact=True).click()
        saved = ours.locator("#checkpoints tbody tr").first
        with page.context.expect_page() as opened:
            saved.get_by_role("link", name="MLflow").click()
        expect(opened.value.get_by_text("adapter_config.json").first).to_be_visible()
        opened.value.close()

        saved.get_by_text("Python").click()
        (path, *_) = (checkpoint["path"] for checkpoint in deployment.wait(two_jobs[0]).checkpoints)
        expect(saved.locator("pre")).to_contain_text(
            f'mlflow.set_tracking_uri("{deployment.servers.mlflow_url}")'
        )
        expect(saved.locator("pre")).to_contain_text(f'chat = mlflow.transformers.load_model("{path}")')
        saved.get_by_role("button", name="Copy").click()
        expect(saved.get_by_role("button")).to_have_text("Copied")

        ours.get_by_role("link", name="DAG run").click()
        expect(page).to_have_url(re.compile(f"/dags/supervised_fine_tune/runs/{two_jobs[0]}"))


def test_rewards_of_a_preference_job_are_drawn(deployment: Deployment, visits: Visits) -> None:
    body = long_form(deployment)  # the job of ``test_algorithms``, where it has come first
    with deployment.http() as http:
        answer = http.post("/post-training/v1/post-training/preference-optimize", json=body)
        assert answer.status_code == 200, answer.text
    assert deployment.wait(body["job_uuid"]).status == "completed"
    with visits.page() as page:
        page.goto(visits.url(f"job?job_uuid={body['job_uuid']}"))
        for title, line in (("Rewards", "chosen"), ("Reward accuracy", "training")):
            figure = page.locator("figure", has=page.get_by_text(title, exact=True))
            expect(figure.locator("canvas")).to_be_visible()
            expect(figure.locator(".legend")).to_contain_text(re.compile(rf"{line} [-\d.]+"))


def test_the_tab_of_a_dag_run_shows_its_job(
    deployment: Deployment, two_jobs: list[str], visits: Visits
) -> None:
    with visits.page() as page:
        run = f"{deployment.servers.airflow_url}/dags/supervised_fine_tune/runs/{two_jobs[0]}"
        page.goto(run)
        page.locator("a[href$='/plugin/post-training-run']").click()  # the navigation has a link of that name
        ours = in_airflow(page)
        expect(ours.get_by_role("heading", name=two_jobs[0])).to_be_visible()
        expect(ours.locator("#badge")).to_have_text("Completed")


def test_a_refused_field_is_told_of_beside_it(deployment: Deployment, visits: Visits) -> None:
    with visits.page() as page:
        page.goto(visits.url("new"))
        fill(page, deployment, "refused", n_epochs=0)
        page.get_by_role("button", name="Start job").click()
        field = page.locator("[name='training_config.n_epochs']")
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        expect(page.locator("[id='field-training_config.n_epochs-error']")).to_contain_text("got '0'")
        expect(page.locator("#notice")).to_contain_text("The job was not started")
    assert len(visits.problems) == 1, "the browser itself notes an answer of 400"
    visits.problems.clear()


def test_a_viewer_is_offered_nothing_that_would_fail(two_jobs: list[str], visits: Visits) -> None:
    with visits.page(user="viewer") as page:
        page.goto(visits.url())
        expect(page.get_by_role("link", name=two_jobs[0], exact=True)).to_be_visible()
        expect(page.get_by_role("link", name="New job")).to_have_count(0)
        page.goto(visits.url(f"job?job_uuid={two_jobs[0]}"))
        expect(page.locator("#badge")).to_have_text("Completed")
        expect(page.locator("#actions button, #actions .button")).to_have_count(0)


def test_a_job_that_is_none_is_said_to_be_none(visits: Visits) -> None:
    with visits.page() as page:
        page.goto(visits.url("job?job_uuid=<img src=x onerror=alert(1)>"))
        expect(page.locator("#notice")).to_contain_text("There is no such job")
        expect(page.get_by_role("heading", level=1)).to_have_text("<img src=x onerror=alert(1)>")
        expect(page.locator("img")).to_have_count(0)
    visits.problems.clear()  # the browser itself notes the 404


def test_who_is_not_logged_in_comes_to_the_login_and_back(deployment: Deployment, visits: Visits) -> None:
    with visits.page(user="") as page:
        page.goto(visits.url("new"))
        page.get_by_label("Username").fill("viewer")
        page.get_by_label("Password", exact=True).fill(deployment.servers.password("viewer"))
        page.get_by_role("button", name="Sign in").click()
        expect(page.locator("#notice")).to_contain_text("Airflow does not allow you to do this.")
        assert page.url == visits.url("new")
    visits.problems.clear()  # the browser itself notes the 403


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_has_no_grave_fault_of_accessibility(
    two_jobs: list[str], visits: Visits, theme: str, size: tuple[int, int]
) -> None:
    pages = {
        "": "#jobs tbody tr",
        f"job?job_uuid={two_jobs[0]}": "#curves canvas",
        f"compare?jobs={','.join(two_jobs)}": "#params tbody tr",
        "new": "#form button",
    }
    faults = []
    with visits.page(theme=theme, size=size) as page:
        for path, shown in pages.items():
            page.goto(visits.url(path))
            page.locator(shown).first.wait_for()
            width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert width <= 0, f"{path} is {width} pixels too wide"
            found = Axe().run(page).response["violations"]
            faults += [
                f"{path or 'list'}: {fault['id']} at {[node['target'] for node in fault['nodes']]}"
                for fault in found
                if fault["impact"] in GRAVE
            ]
    assert faults == []


def test_it_follows_airflows_color_mode(two_jobs: list[str], deployment: Deployment, visits: Visits) -> None:
    with visits.page(theme="dark") as page:
        page.goto(f"{deployment.servers.airflow_url}/plugin/post-training")
        ours = in_airflow(page)
        expect(ours.locator("html")).to_have_attribute("data-theme", "dark")
        page.evaluate("localStorage.setItem('theme', 'light')")
        expect(ours.locator("html")).to_have_attribute("data-theme", "light")


def test_the_keyboard_reaches_a_job(two_jobs: list[str], visits: Visits) -> None:
    with visits.page() as page:
        page.goto(visits.url())
        page.get_by_role("link", name=two_jobs[0], exact=True).wait_for()
        page.get_by_role("searchbox").focus()
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == two_jobs[0]:
                break
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text(two_jobs[0])
