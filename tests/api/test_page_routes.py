"""The page's documents and files, and what its scripts ask."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from post_training.api.page_routes import FOLDER, PAGES
from tests.api.conftest import Deployment
from tests.requests_of import sft_body

STATIC = FOLDER / "static"
FILES = sorted(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", PAGES)
def test_a_document_runs_its_own_scripts_alone(deployment: Deployment, path: str) -> None:
    answer = deployment.client("viewer").get(f"/ui/{path}?job_uuid=a&whatever=b")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]
    assert "{version}" not in answer.text
    assert not re.search(r"<script(?! [^>]*src=)|<style|\son\w+=|\sstyle=|https?://", answer.text)


@pytest.mark.parametrize("path", PAGES)
def test_every_file_that_a_document_names_is_there_and_kept(deployment: Deployment, path: str) -> None:
    client = deployment.client()
    named = re.findall(r'(?:src|href)="(static/[^"]+)"', client.get(f"/ui/{path}").text)
    assert len(named) >= 4
    for name in named:
        answer = client.get(f"/ui/{name}")
        assert answer.status_code == 200, name
        assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_its_kind(deployment: Deployment, name: str) -> None:
    answer = deployment.client().get(f"/ui/static/current/{name}")
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", "": "text/plain"}
    assert answer.headers["content-type"].partition(";")[0] == kinds[Path(name).suffix]
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "../list.html", "..%2Flist.html", "%2e%2e/list.html"])
def test_nothing_else_is_served(deployment: Deployment, name: str) -> None:
    assert deployment.client().get(f"/ui/static/current/{name}").status_code == 404


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js") and "vendor" not in name])
def test_scripts_import_what_is_there_and_write_no_markup(name: str) -> None:
    text = (STATIC / name).read_text()
    for imported in re.findall(r'from "(\./[^"]+)"', text):
        assert (STATIC / name).parent.joinpath(imported).is_file(), imported
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)


@pytest.mark.parametrize("path", [*PAGES, "static/current/list.js"])
def test_who_is_not_logged_in_is_sent_to_the_login(deployment: Deployment, path: str) -> None:
    answer = deployment.client("nobody").get(f"/ui/{path}", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("../../api/v2/auth/login?next=/ui/")


@pytest.mark.parametrize("path", ["jobs", "job?job_uuid=x", "curves?jobs=x", "forms"])
def test_scripts_are_told_that_nobody_is_logged_in(deployment: Deployment, path: str) -> None:
    answer = deployment.client("nobody").get(f"/ui/data/{path}")
    assert (answer.status_code, answer.json()) == (401, {"detail": "Not authenticated"})


def filled(**changes: Any) -> dict[str, Any]:
    fields = {
        "model": "org/model",
        "training_config.data_config.dataset_id": "rows.jsonl",
        "training_config.data_config.batch_size": "4",
        "training_config.data_config.shuffle": True,
        "training_config.data_config.data_format": "instruct",
        "training_config.n_epochs": "1",
    }
    return {"method": "supervised_fine_tune", "job_uuid": "job-1", "fields": fields | changes}


def test_a_filled_form_starts_a_job_that_the_list_and_its_page_show(deployment: Deployment) -> None:
    client = deployment.client()
    assert client.post("/ui/data/jobs", json=filled()).json() == {"job_uuid": "job-1"}
    page = client.get("/ui/data/jobs").json()
    assert [job["job_uuid"] for job in page["jobs"]] == ["job-1"]
    assert (page["total"], page["may_submit"], page["notice"]) == (1, True, None)
    job = client.get("/ui/data/job", params={"job_uuid": "job-1"}).json()
    assert (job["status"], job["algorithm"], job["may_cancel"]) == ("scheduled", "full fine-tuning", True)
    assert client.get("/ui/data/curves?jobs=job-1").json() == {"jobs": [{"job_uuid": "job-1", "metrics": {}}]}


def test_a_wrong_field_is_named(deployment: Deployment) -> None:
    wrong = filled(**{"training_config.n_epochs": "none"})
    answer = deployment.client().post("/ui/data/jobs", json=wrong)
    assert answer.status_code == 400
    (error,) = answer.json()["detail"]["errors"]
    assert error["loc"] == ["training_config", "n_epochs"]
    assert "'none'" in error["msg"]


def test_a_viewer_sees_and_starts_nothing(deployment: Deployment) -> None:
    deployment.client().post("/v1/post-training/supervised-fine-tune", json=sft_body())
    viewer = deployment.client("viewer")
    assert viewer.post("/ui/data/jobs", json=filled(model="m")).status_code == 403
    assert viewer.get("/ui/data/forms").status_code == 403
    page = viewer.get("/ui/data/jobs").json()
    assert (page["total"], page["may_submit"]) == (1, False)
    job = viewer.get("/ui/data/job?job_uuid=job-1").json()
    assert [job[name] for name in ("may_cancel", "may_retry", "may_clone")] == [False] * 3


def test_a_stranger_sees_nothing(deployment: Deployment) -> None:
    deployment.client().post("/v1/post-training/supervised-fine-tune", json=sft_body())
    stranger = deployment.client("stranger")
    assert stranger.get("/ui/data/jobs").json()["jobs"] == []
    for path in ("job?job_uuid=job-1", "curves?jobs=job-1"):
        assert stranger.get(f"/ui/data/{path}").status_code == 404


def test_the_form_of_a_clone_is_filled(deployment: Deployment) -> None:
    client = deployment.client()
    client.post("/v1/post-training/supervised-fine-tune", json=sft_body())
    assert [form["method"] for form in client.get("/ui/data/forms").json()] == [
        "supervised_fine_tune",
        "preference_optimize",
    ]
    (form,) = client.get("/ui/data/forms?clone=job-1").json()
    values = {field["path"]: field["value"] for field in form["fields"]}
    assert (values["model"], values["algorithm_config.rank"]) == ("org/model", 4)
    assert client.get("/ui/data/forms?clone=nothing").status_code == 404


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("jobs?status=gone", "status"),
        ("jobs?limit=0", "limit"),
        ("jobs?limit=101", "limit"),
        ("jobs?offset=-1", "offset"),
        (f"jobs?text={'x' * 201}", "text"),
        ("jobs?what=1", "what"),
        ("curves", "jobs"),
    ],
)
def test_a_query_that_means_nothing_is_refused(deployment: Deployment, query: str, named: str) -> None:
    answer = deployment.client().get(f"/ui/data/{query}")
    assert answer.status_code == 400
    assert named in str(answer.json())


def test_more_jobs_than_can_be_told_apart_are_not_compared(deployment: Deployment) -> None:
    answer = deployment.client().get("/ui/data/curves?jobs=" + ",".join(f"j{n}" for n in range(9)))
    assert answer.status_code == 400
    assert "may name 8 jobs, got 9" in answer.text
