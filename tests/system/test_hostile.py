"""Hostile calls of the real servers: no 5xx, no traceback, and no job, DAG run or MLflow run but of a 200."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from benchmarks.load import Jobs, jobs, pause
from post_training.standalone import DAG_IDS
from tests.hostile import JOB_IDS, near, raw_bodies
from tests.requests_of import changed
from tests.system.conftest import Deployment

pytestmark = pytest.mark.system
API = "/post-training/v1/post-training"
SUBMIT = f"{API}/supervised-fine-tune"
JSON = {"Content-Type": "application/json"}


def bounded(examples: int) -> settings:
    """Return the settings of a test that does the same each time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def paused(deployment: Deployment) -> Iterator[None]:
    """Let nothing that is accepted here train, and leave nothing of it."""
    before = jobs(deployment.servers)
    pause(deployment.servers)
    yield
    with deployment.http() as http:
        for dag_id in DAG_IDS:
            for run_id in jobs(deployment.servers).dag_runs - before.dag_runs:
                http.delete(f"/api/v2/dags/{dag_id}/dagRuns/{run_id}")
    pause(deployment.servers, paused=False)


@pytest.fixture
def before(deployment: Deployment) -> Jobs:
    return jobs(deployment.servers)


def assert_made(deployment: Deployment, before: Jobs, accepted: set[str]) -> None:
    """Each accepted job, and nothing else, has one DAG run and one MLflow run."""
    now = jobs(deployment.servers)
    assert now.dag_runs - before.dag_runs == Counter(accepted)
    assert now.mlflow_runs - before.mlflow_runs == Counter(accepted)


def assert_decent(answer: Any) -> None:
    """No answer is a server's fault, or shows its inside."""
    assert answer.status_code < 500, answer.text
    assert "Traceback" not in answer.text
    assert 'File "/' not in answer.text


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("token", ["admin's", "nobody's"])
def test_every_route(deployment: Deployment, before: Jobs, mode: GenerationMode, token: str) -> None:
    headers = {"Authorization": f"Bearer {deployment.servers.token()}"}
    caller = headers if token == "admin's" else {"Authorization": "Bearer nobody's"}
    url = f"{deployment.servers.service_url}/openapi.json"
    accepted: set[str] = set()
    for operation in schemathesis.openapi.from_url(url, headers=headers).get_all_operations():

        @bounded(3)
        @given(case=operation.ok().as_strategy(generation_mode=mode))
        def call(case: Any) -> None:
            answer = case.call(base_url=deployment.servers.service_url, headers=caller, timeout=120)
            assert_decent(answer)
            if caller is not headers:
                assert answer.status_code in (401, 413), (case.as_curl_command(), answer.text)
            if answer.status_code == 200 and case.path.endswith(("tune", "optimize")):
                accepted.add(answer.json()["job_uuid"])

        call()
    assert_made(deployment, before, accepted)


def test_bodies_near_a_valid_one(deployment: Deployment, before: Jobs) -> None:
    accepted: set[str] = set()
    answers: Counter[int] = Counter()
    ids = [f"near-{number}" for number in range(4)]
    with deployment.http() as http:

        @bounded(60)
        @given(body=near(deployment.body("near"), ids))
        def submit(body: dict[str, Any]) -> None:
            answer = http.post(SUBMIT, content=json.dumps(body), headers=JSON)
            assert_decent(answer)
            answers[answer.status_code] += 1
            if answer.status_code == 200:
                accepted.add(answer.json()["job_uuid"])

        submit()
    assert {200, 400} <= set(answers) <= {200, 400, 409}, answers
    assert_made(deployment, before, accepted)


def test_bodies_that_are_no_request(deployment: Deployment, before: Jobs) -> None:
    with deployment.http() as http:
        for name, (content, headers, sentence) in raw_bodies(deployment.body("raw"), depth=10_000).items():
            answer = http.post(SUBMIT, content=content, headers=headers)
            assert answer.status_code == 400, (name, answer.text)
            assert sentence in answer.text.replace('\\"', '"'), (name, answer.text)
            pieces = http.post(SUBMIT, content=iter([content]), headers=headers)
            assert pieces.json() == answer.json(), name
    assert_made(deployment, before, set())


def test_ids_that_are_none(deployment: Deployment) -> None:
    with deployment.http() as http:
        for job_id in JOB_IDS:
            for name in ("status", "artifacts", "logs"):
                by_path = http.get(f"{API}/jobs/{job_id}/{name}")
                by_query = http.get(f"{API}/job/{name}?job_uuid={job_id}")
                assert by_path.status_code == 404, (job_id, by_path.text)
                assert by_query.status_code in (400, 404), (job_id, by_query.text)
            assert http.post(f"{API}/jobs/{job_id}/cancel").status_code == 404


@pytest.mark.parametrize(
    "conf",
    [
        {"mlflow_run_id": "'; DROP TABLE runs; --"},
        {"mlflow_run_id": ["a"]},
        {"mlflow_run_id": "../../../etc/passwd"},
        {"job_uuid": "another"},
        {"__proto__": {"a": 1}},
        {"training_config.n_epochs": 10**30},
        {"training_config": {"n_epochs": 2}},
        {"model": "{{ 7 * 7 }}"},
        {"model": "\u0000"},
        {"logger_config.tags": {"a": {"b": 1}}},
    ],
)
def test_conf_of_airflows_own_trigger(deployment: Deployment, conf: dict[str, Any]) -> None:
    """Airflow takes what is unknown to it; our routes then read that run."""
    run_id = f"trigger-{abs(hash(json.dumps(conf)))}"
    whole = {
        "training_config.data_config.dataset_id": str(deployment.data / "train.jsonl"),
        "model": str(deployment.model),
    } | conf
    with deployment.http() as http:
        body = {"dag_run_id": run_id, "conf": whole, "logical_date": None}
        answer = http.post("/api/v2/dags/supervised_fine_tune/dagRuns", json=body)
        assert_decent(answer)
        for name in ("status", "artifacts", "logs"):
            read = http.get(f"{API}/jobs/{run_id}/{name}")
            assert_decent(read)
            assert read.status_code == (200 if answer.is_success else 404), read.text
        stopped = http.post(f"{API}/jobs/{run_id}/cancel")
        assert stopped.status_code == (200 if answer.is_success else 404), stopped.text


def routes(http: httpx.Client) -> list[tuple[str, str]]:
    """Return method and path of every route of a job, of one that exists."""
    described = http.get("/post-training/openapi.json").json()["paths"]
    return [
        (method.upper(), f"/post-training{path}".replace("{job_uuid}", "roles"))
        for path, item in described.items()
        for method in item
        if "/job" in path
    ]


def test_viewer_user_and_admin(deployment: Deployment) -> None:
    body = deployment.body("roles")
    clients = {name: deployment.http(name) for name in ("viewer", "user", "admin")}
    assert clients["viewer"].post(SUBMIT, json=body).status_code == 403
    assert clients["user"].post(SUBMIT, json=body).status_code == 200
    other = changed(body, job_uuid="of-admin")
    assert clients["admin"].post(SUBMIT, json=other).status_code == 200
    for method, path in routes(clients["admin"]):
        arguments: dict[str, Any] = {"params": {"job_uuid": "roles"}} if "/job/" in path else {}
        seen = clients["viewer"].request(method, path, **arguments).status_code
        assert seen == (200 if method == "GET" else 403), (method, path)
        bare = clients["viewer"].request(method, path, headers={"Authorization": ""}, **arguments)
        assert bare.status_code == 401, (method, path)
        unknown = {"params": {"job_uuid": "unknown"}} if arguments else {}
        if not path.endswith("/jobs"):
            answer = clients["user"].request(method, path.replace("roles", "unknown"), **unknown)
            assert answer.status_code == 404, (method, path, answer.text)
    assert clients["user"].post(f"{API}/jobs/of-admin/cancel").status_code == 200
    assert clients["admin"].post(f"{API}/jobs/roles/cancel").status_code == 200
    for client in clients.values():
        client.close()


def test_the_key_of_a_signed_address_is_told_to_nobody(deployment: Deployment) -> None:
    """8.8.8.8 is public and needs no look-up; nothing is fetched, the DAG is paused."""
    place = "training_config__data_config__dataset_id"
    signed = "https://8.8.8.8/rows.jsonl?X-Amz-Signature=SECRET"
    with deployment.http() as http:
        accepted = http.post(SUBMIT, json=changed(deployment.body("signed"), **{place: signed}))
        assert accepted.status_code == 200, accepted.text
        refused = [
            signed.replace("8.8.8.8", "10.0.0.1"),
            signed.replace("8.8.8.8", "user:SECRET@8.8.8.8"),
            signed.replace("https", "ftp"),
            "https://[8/rows.jsonl?SECRET",
            "s3://SECRET:SECRET@bucket/rows.jsonl",
            "https://8.8.8.8/rows.exe?SECRET",
        ]
        answers = [
            http.post(SUBMIT, json=changed(deployment.body("refused"), **{place: uri})) for uri in refused
        ]
        answers += [http.get(f"{API}/jobs/signed/{name}") for name in ("status", "artifacts", "logs")]
        assert http.post(f"{API}/jobs/signed/cancel").status_code == 200
    assert [answer.status_code for answer in answers] == [400] * len(refused) + [200] * 3
    assert "SECRET" not in "".join(answer.text for answer in answers)
    (run,) = deployment.runs_of("signed")
    file = deployment.mlflow.download_artifacts(run.info.run_id, "request.json")
    recorded = repr(run.to_dictionary()) + Path(file).read_text()
    assert recorded.count("https://8.8.8.8/rows.jsonl") >= 2
    assert "SECRET" not in recorded
    assert accepted.json() == {"job_uuid": "signed"}
    for log in deployment.servers.layout.home.glob("*.log"):
        assert "SECRET" not in log.read_text(errors="replace"), log.name
