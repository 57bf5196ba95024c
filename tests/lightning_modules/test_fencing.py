"""An attempt that a newer one has superseded writes nothing more into the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from lightning_modules.fencing import CHECK_SECONDS, RunFence, watch_of
from lightning_modules.record import open_record
from post_training.errors import RecordUnavailableError, SupersededError
from post_training.schemas.record import TAG_ATTEMPT_ID, TAG_CANCELLED_ATTEMPT, TAG_FOLLOWED
from post_training.schemas.trainer import TrainerSpec
from post_training.standalone_layout import free_ports
from tests.lightning_modules.recorded import (
    EPOCH_0,
    models,
    points,
    state_files,
    stored_state,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer

OLDER, NEWER = "0199-a", "0199-b"


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fence_of(client: MlflowClient, run_id: str, clock: Clock) -> Any:
    return lambda attempt_id, **options: RunFence(client, run_id, attempt_id, clock, **options)


def test_a_job_on_ray_goes_on_for_the_attempt_that_follows_it(
    client: MlflowClient, run_id: str, fence_of: Any
) -> None:
    client.set_tag(run_id, TAG_FOLLOWED, OLDER)
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    fence_of(OLDER).check(now=True)
    client.set_tag(run_id, TAG_CANCELLED_ATTEMPT, NEWER)
    with pytest.raises(SupersededError, match="cancelled"):
        fence_of(OLDER).check(now=True)


def test_who_waits_for_nodes_asks_whether_the_job_is_wanted(
    client: MlflowClient, run_id: str, make_spec: Any, mlflow_server: MLflowServer
) -> None:
    tracking = {"tracking_uri": mlflow_server.uri, "run_id": run_id}
    spec = make_spec(runtime={"launcher": "ray"}, attempt_id=OLDER, tracking=tracking)
    client.set_tag(run_id, TAG_FOLLOWED, OLDER)
    check = watch_of(spec)
    check()
    client.set_tag(run_id, TAG_FOLLOWED, "")
    with pytest.raises(SupersededError):
        check()
    away = {"tracking_uri": f"http://127.0.0.1:{free_ports(1)[0]}", "run_id": run_id}
    watch_of(make_spec(runtime={"launcher": "ray"}, attempt_id=OLDER, tracking=away))()


def test_a_job_on_ray_ends_that_nobody_follows_any_more(
    client: MlflowClient, run_id: str, fence_of: Any
) -> None:
    client.set_tag(run_id, TAG_ATTEMPT_ID, OLDER)
    client.set_tag(run_id, TAG_FOLLOWED, OLDER)
    fence_of(OLDER, on_ray=True).check(now=True)
    client.set_tag(run_id, TAG_FOLLOWED, "")
    fence_of(OLDER).check(now=True)
    with pytest.raises(SupersededError):
        fence_of(OLDER, on_ray=True).check(now=True)


def test_the_newest_attempt_and_one_that_has_no_id_go_on(
    client: MlflowClient, run_id: str, fence_of: Any
) -> None:
    fence_of(OLDER).check(now=True)  # the run says nothing yet
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    fence_of(NEWER).check(now=True)
    fence_of("").check(now=True)
    with pytest.raises(SupersededError, match="a newer one runs"):
        fence_of(OLDER).check()


def test_a_cancelled_attempt_ends_and_a_later_one_does_not(
    client: MlflowClient, run_id: str, fence_of: Any
) -> None:
    client.set_tag(run_id, TAG_CANCELLED_ATTEMPT, OLDER)
    with pytest.raises(SupersededError, match="This attempt was cancelled"):
        fence_of(OLDER).check()
    fence_of(NEWER).check()


def test_an_attempt_whose_successor_was_cancelled_ends_too(
    client: MlflowClient, run_id: str, fence_of: Any
) -> None:
    """Its successor may have had an id and not begun: its task was cleared while it ran."""
    client.set_tag(run_id, TAG_CANCELLED_ATTEMPT, NEWER)
    with pytest.raises(SupersededError, match="This attempt was cancelled"):
        fence_of(OLDER).check()


def test_a_run_that_an_older_attempt_claimed_last_is_claimed_back(
    client: MlflowClient, run_id: str, fence_of: Any
) -> None:
    client.set_tag(run_id, TAG_ATTEMPT_ID, OLDER)  # its slow claim came after the newer one's
    fence_of(NEWER).check()
    assert client.get_run(run_id).data.tags[TAG_ATTEMPT_ID] == NEWER
    with pytest.raises(SupersededError):
        fence_of(OLDER).check(now=True)


def test_the_run_is_looked_at_now_and_then_and_before_what_readers_rely_on(
    client: MlflowClient, run_id: str, fence_of: Any, clock: Clock
) -> None:
    fence = fence_of(OLDER)
    fence.check()
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    clock.seconds += CHECK_SECONDS * 0.9
    fence.check()
    assert not fence.superseded
    clock.seconds += CHECK_SECONDS * 0.2
    with pytest.raises(SupersededError):
        fence.check()
    assert fence.superseded

    eager = fence_of(OLDER)
    client.set_tag(run_id, TAG_ATTEMPT_ID, OLDER)
    eager.check()
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    with pytest.raises(SupersededError):
        eager.check(now=True)


def test_once_superseded_is_for_good_and_needs_no_answer(
    server: MLflowServer, client: MlflowClient, run_id: str, fence_of: Any
) -> None:
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    fence = fence_of(OLDER)
    with pytest.raises(SupersededError):
        fence.check()
    client.set_tag(run_id, TAG_ATTEMPT_ID, OLDER)
    server.stop()
    with pytest.raises(SupersededError):
        fence.check(now=True)


def test_without_an_answer_nothing_is_known(server: MLflowServer, fence_of: Any) -> None:
    server.stop()
    fence = fence_of(OLDER)
    with pytest.raises(Exception, match=r"Connection refused|Max retries"):
        fence.check()
    assert not fence.superseded


@pytest.fixture
def older(client: MlflowClient, run_id: str, spec: TrainerSpec) -> Iterator[Any]:
    """The record of an attempt that has claimed the run, before a newer one begins."""
    client.set_tag(run_id, TAG_ATTEMPT_ID, OLDER)
    record = open_record(spec.model_copy(update={"attempt_id": OLDER}), close_timeout=5.0)
    yield record
    record.close()


def test_an_attempt_that_has_nothing_to_record_notices_the_newer_one(
    client: MlflowClient, run_id: str, older: Any
) -> None:
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    wait_until(lambda: older.superseded)


def test_a_superseded_record_writes_nothing_of_any_kind(
    client: MlflowClient, run_id: str, older: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older.log_metrics({"train_loss": 1.0}, 1)
    wait_until(lambda: points(client, run_id) == [(1, 1.0)])
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    state = folder / "last.ckpt"
    state.write_text("state")

    older.log_state(state, step=2, inputs="x", must=True)
    checkpoint = older.log_checkpoint(folder, step=2, metrics=EPOCH_0)
    wait_until(lambda: older.superseded)
    older.log_metrics({"train_loss": 2.0}, 2)
    older.set_tag("color", "blue")
    older.log_table("samples.json", ("a",), [(1,)])
    with pytest.raises(RecordUnavailableError):
        older.settled([checkpoint], [0], lambda: False)
    older.close()

    run = client.get_run(run_id)
    assert points(client, run_id) == [(1, 1.0)]
    assert run.data.tags.keys() & {"color", "mlflow.loggedArtifacts"} == set()
    assert models(client, run_id) == []
    assert (stored_state(client, run_id), state_files(client, run_id)) == (None, [])
    assert list(client.list_artifacts(run_id)) == []
    assert "This attempt was cancelled, or a newer one runs. Nothing more is recorded." in caplog.text
    assert "was not sent in" not in caplog.text


def test_settling_ends_as_soon_as_a_newer_attempt_is_seen(
    client: MlflowClient, run_id: str, older: Any, folder: Path
) -> None:
    client.set_tag(run_id, TAG_ATTEMPT_ID, NEWER)
    checkpoint = older.log_checkpoint(folder, step=2, metrics=EPOCH_0)
    with pytest.raises(RecordUnavailableError):  # within seconds, not after ten minutes
        older.settled([checkpoint], [0], lambda: bool(older.superseded))
    assert older.superseded
