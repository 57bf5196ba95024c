"""The client of Ray's Jobs API, over a server that speaks it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from post_training.errors import ClusterRefusesError, ClusterUnavailableError, TrainerError
from post_training.launch.ray_jobs import RayJob, RayJobs, result_in, without_result
from post_training.standalone_layout import free_ports
from tests.ray_api import TOKEN, RayApi

SPEC = json.dumps({"attempt": 1})


@pytest.fixture
def api() -> Iterator[RayApi]:
    """A cluster without jobs."""
    server = RayApi()
    yield server
    server.close()


def jobs_of(api: RayApi) -> RayJobs:
    return RayJobs(f"{api.address}/", TOKEN)


def test_a_job_gets_its_spec_and_the_credentials(api: RayApi) -> None:
    jobs_of(api).submit("one", SPEC, {"MLFLOW_TRACKING_PASSWORD": "secret"})
    body = api.jobs["one"].body
    assert body["entrypoint"] == "python -m lightning_modules.on_ray spec.json"
    assert api.spec_of("one") == {"attempt": 1}
    assert body["runtime_env"]["env_vars"]["MLFLOW_TRACKING_PASSWORD"] == "secret"


def test_a_job_that_was_submitted_and_nobody_heard_of_is_not_submitted_again(api: RayApi) -> None:
    api.loses_answers = True
    jobs_of(api).submit("one", SPEC, {})
    jobs_of(api).submit("one", SPEC, {})
    assert list(api.jobs) == ["one"]


def test_jobs_are_found_read_and_stopped(api: RayApi) -> None:
    jobs = jobs_of(api)
    assert jobs.find("one") is None
    jobs.stop("one")
    jobs.submit("one", SPEC, {})
    api.jobs["one"].log = "a line\n"
    assert (jobs.find("one"), jobs.log("one")) == (RayJob("RUNNING"), "a line\n")
    jobs.stop("one")
    found = jobs.find("one")
    assert found is not None
    assert (found.status, found.ended, api.stopped) == ("STOPPED", True, ["one"])


def test_an_address_that_does_not_answer_is_named() -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ClusterUnavailableError) as caught:
        RayJobs(address).find("one")
    sentence = str(caught.value)
    assert sentence.startswith("[post_training] ray_address must lead to a Ray cluster's Jobs API, got ")
    assert address in sentence
    assert "ConnectError" in sentence


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(ClusterRefusesError, match="got 'head'"):
        RayJobs("head").find("one")


def test_a_wrong_token_is_told_and_not_shown(api: RayApi) -> None:
    with pytest.raises(ClusterRefusesError, match="ray_token must be the token of the Ray cluster") as no:
        RayJobs(api.address, "another").find("one")
    assert "another" not in str(no.value)


def test_a_refusal_is_told_in_one_line(api: RayApi) -> None:
    api.refuses = "no such runtime_env"
    with pytest.raises(ClusterRefusesError, match=r"400 ValueError: no such runtime_env$"):
        jobs_of(api).submit("one", SPEC, {})


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_refusal_that_may_pass_is_none_for_good(api: RayApi, code: int) -> None:
    api.answer = lambda *call: (code, "busy")  # type: ignore[method-assign]
    with pytest.raises(ClusterUnavailableError, match=f"{code} busy") as caught:
        jobs_of(api).find("one")
    assert not isinstance(caught.value, ClusterRefusesError)


def test_something_else_at_the_address_is_told(api: RayApi) -> None:
    api.answer = lambda *call: (200, "<html>")  # type: ignore[method-assign]
    with pytest.raises(ClusterUnavailableError, match="200 <html>"):
        jobs_of(api).find("one")


def test_the_result_is_that_of_the_attempt() -> None:
    lines = [f'result of the attempt: {{"attempt_id": "{name}", "status": "completed"}}' for name in "ab"]
    log = "\n".join(["loss 1.5", *lines, "bye"])
    assert result_in(log, RayJob("SUCCEEDED"), "a").attempt_id == "a"
    assert result_in(f"(pid=7) loss{lines[0]}\n{lines[1]}x", RayJob("SUCCEEDED"), "a").attempt_id == "a"
    with pytest.raises(TrainerError, match=r"ended as FAILED without a result: the driver died$"):
        result_in(log, RayJob("FAILED", "the driver\ndied"), "c")


@pytest.mark.parametrize(
    ("line", "shown"),
    [("loss 1.5\n", True), ("\n", False), ('(pid=7) result of the attempt: {"a"}\n', False)],
)
def test_the_log_is_what_says_something_to_people(line: str, shown: bool) -> None:
    assert without_result(line) is shown
