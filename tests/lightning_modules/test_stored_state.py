"""The state that a retry on another machine goes on from, in the job's run on a real MLflow server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from lightning_modules.mlflow_record import MLflowRecord, open_mlflow_record
from lightning_modules.record import SPOOL_FILE, open_record
from lightning_modules.stored_state import StateStore
from lightning_modules.trained import sha256_of
from post_training.errors import RecordUnavailableError
from post_training.schemas.record import TAG_RESUME_STATE
from post_training.schemas.trainer import StoredState, TrainerSpec
from tests.lightning_modules.recorded import begun, points, retried, state_files, stored_state
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.mlflow_server import MLflowServer


@pytest.fixture
def store(server: MLflowServer, client: MlflowClient, run_id: str) -> StateStore:
    return StateStore(client, server.uri, run_id)


@pytest.fixture
def last(tmp_path: Path) -> Path:
    """The file that the trainer replaces at each save."""
    return tmp_path / "last.ckpt"


def save(file: Path, text: str) -> Path:
    """Replace the file by rename, as a trainer does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(text)
    os.replace(file.with_suffix(".tmp"), file)
    return file


def announced(store: StateStore, folder: Path, step: int, inputs: str = "x") -> StoredState:
    file = save(folder / f"step-{step}.ckpt", f"state {step}")
    state = StoredState(path=store.upload(file), step=step, inputs=inputs, sha256=sha256_of(file))
    store.announce(state)
    return state


def test_the_newest_state_comes_back_and_older_ones_are_deleted(
    client: MlflowClient, run_id: str, store: StateStore, tmp_path: Path
) -> None:
    assert store.newest() is None
    announced(store, tmp_path, 3)
    store.upload(save(tmp_path / "step-6.ckpt", "of an attempt that was killed before it said so"))
    newest = announced(store, tmp_path, 9)
    assert store.newest() == stored_state(client, run_id) == newest
    assert state_files(client, run_id) == ["step-9.ckpt"]
    target = tmp_path / "elsewhere" / "resume" / "last.ckpt"
    assert store.download(newest, target)
    assert target.read_text() == "state 9"
    assert list(target.parent.iterdir()) == [target]


def test_a_tag_that_somebody_edited_names_no_state(
    client: MlflowClient, run_id: str, store: StateStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.set_tag(run_id, TAG_RESUME_STATE, "edited by hand")
    assert store.newest() is None
    assert "names no state: edited by hand" in caplog.text
    assert not store.has(step=3, inputs="x")
    assert announced(store, tmp_path, 3) == store.newest()


def test_a_state_that_is_announced_again_stays(
    client: MlflowClient, run_id: str, store: StateStore, tmp_path: Path
) -> None:
    announced(store, tmp_path, 3)
    announced(store, tmp_path, 3)
    assert state_files(client, run_id) == ["step-3.ckpt"]


@pytest.mark.parametrize(
    ("step", "inputs", "has"), [(3, "x", True), (2, "x", True), (4, "x", False), (3, "y", False)]
)
def test_it_knows_what_it_has(step: int, inputs: str, has: bool, store: StateStore, tmp_path: Path) -> None:
    assert not store.has(step=step, inputs=inputs)
    announced(store, tmp_path, 3)
    assert store.has(step=step, inputs=inputs) is has


def test_a_damaged_state_is_not_used(
    server: MLflowServer, run_id: str, store: StateStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = announced(store, tmp_path, 3)
    (server.home / "artifacts" / "0" / run_id / "artifacts" / state.path).write_text("state 4")
    target = save(tmp_path / "elsewhere" / "last.ckpt", "mine")
    assert not store.download(state, target)
    assert target.read_text() == "mine"
    assert list(target.parent.iterdir()) == [target]
    assert "the state in MLflow at step 3 is damaged and not used" in caplog.text


def test_a_state_whose_file_is_gone_is_not_used(
    server: MLflowServer, run_id: str, store: StateStore, tmp_path: Path
) -> None:
    state = announced(store, tmp_path, 3)
    (server.home / "artifacts" / "0" / run_id / "artifacts" / state.path).unlink()
    assert not store.download(state, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def never() -> bool:
    return False


def test_a_state_reaches_an_attempt_on_another_machine_after_all_its_metrics(
    client: MlflowClient, run_id: str, spec: TrainerSpec, last: Path, tmp_path: Path
) -> None:
    first = open_record(spec)
    for step in range(1, 301):
        first.log_metrics({"train_loss": float(step)}, step)
    first.log_state(save(last, "state 300"), step=300, inputs="x", must=True)
    save(last, "a later state")  # the copy is not touched by it
    wait_until(lambda: stored_state(client, run_id))
    assert len(points(client, run_id)) == 300
    first.close()

    second = begun(retried(spec, work_dir=tmp_path / "elsewhere"))
    there = tmp_path / "elsewhere" / "resume" / "last.ckpt"
    assert second.restore_state(there, step=None, inputs="x", give_up=never) == 300
    second.close()
    assert there.read_text() == "state 300"


def test_a_file_system_without_hard_links_takes_a_copy(
    client: MlflowClient, run_id: str, spec: TrainerSpec, last: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    record = open_record(spec)
    record.log_state(save(last, "state 1"), step=1, inputs="x", must=True)
    record.close()
    assert state_files(client, run_id) == ["step-1.ckpt"]


@pytest.mark.parametrize(
    ("step", "inputs", "restored"),
    [(None, "x", 9), (8, "x", 9), (9, "x", None), (10, "x", None), (None, "y", None)],
)
def test_only_a_newer_state_of_the_same_training_replaces_the_folder_s(
    step: int | None,
    inputs: str,
    restored: int | None,
    store: StateStore,
    spec: TrainerSpec,
    last: Path,
    tmp_path: Path,
) -> None:
    announced(store, tmp_path, 9)
    record = begun(retried(spec))
    assert record.restore_state(save(last, "mine"), step=step, inputs=inputs, give_up=never) == restored
    record.close()
    assert last.read_text() == ("state 9" if restored else "mine")


def test_what_a_machine_has_kept_for_long_does_not_replace_what_another_stored(
    client: MlflowClient, run_id: str, store: StateStore, spec: TrainerSpec, last: Path, tmp_path: Path
) -> None:
    """Worker A, then B, then A again, whose spool holds an older state that was never sent."""
    unsent = open_mlflow_record(spec, spec.work_dir / SPOOL_FILE, close_timeout=0.0)
    unsent.close()
    unsent.log_state(save(last, "state 3"), step=3, inputs="x", must=True)
    by_b = announced(store, tmp_path / "b", 9)

    again = begun(retried(spec))
    wait_until(lambda: not list((spec.work_dir / "resume").rglob("step-*")))
    assert again.restore_state(last, step=3, inputs="x", give_up=never) == 9
    again.close()
    assert stored_state(client, run_id) == by_b
    assert state_files(client, run_id) == ["step-9.ckpt"]


def test_a_state_of_another_training_is_replaced_by_an_earlier_step(
    client: MlflowClient, run_id: str, store: StateStore, spec: TrainerSpec, last: Path, tmp_path: Path
) -> None:
    announced(store, tmp_path, 9, inputs="of older data")
    record = open_record(spec)
    record.log_state(save(last, "state 2"), step=2, inputs="x", must=True)
    record.close()
    state = stored_state(client, run_id)
    assert state is not None
    assert (state.step, state.inputs) == (2, "x")
    assert state_files(client, run_id) == ["step-2.ckpt"]


def test_states_in_quick_succession_are_passed_over_but_for_an_epoch_s_end(
    client: MlflowClient, run_id: str, spec: TrainerSpec, last: Path
) -> None:
    record = open_record(spec)
    for step in (1, 2, 3):
        record.log_state(save(last, f"state {step}"), step=step, inputs="x", must=False)
    wait_until(lambda: stored_state(client, run_id))
    assert stored_state(client, run_id).step == 1  # type: ignore[union-attr]
    record.log_state(save(last, "state 4"), step=4, inputs="x", must=True)
    record.close()
    assert stored_state(client, run_id).step == 4  # type: ignore[union-attr]


def test_a_deployment_may_keep_no_states_in_mlflow(
    client: MlflowClient, run_id: str, spec: TrainerSpec, last: Path
) -> None:
    record = open_record(spec.model_copy(update={"keep_state_in_mlflow": False}))
    record.log_state(save(last, "state"), step=1, inputs="x", must=True)
    record.close()
    assert (stored_state(client, run_id), state_files(client, run_id)) == (None, [])
    assert not (spec.work_dir / "resume").exists()


def test_a_state_that_is_replaced_while_it_is_uploaded_is_announced(
    client: MlflowClient,
    run_id: str,
    spec: TrainerSpec,
    last: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else no state would ever arrive of a model whose epochs are shorter than its upload."""
    steps = iter(range(2, 7))
    upload = StateStore.upload

    def overtaken(self: StateStore, file: Path) -> str:
        path = upload(self, file)
        for step in steps:
            record.log_state(save(last, f"state {step}"), step=step, inputs="x", must=True)
            break
        seen.append(stored_state(client, run_id))
        return path

    seen: list[StoredState | None] = []
    monkeypatch.setattr(StateStore, "upload", overtaken)
    record = open_record(spec)
    record.log_state(save(last, "state 1"), step=1, inputs="x", must=True)
    wait_until(lambda: (stored_state(client, run_id) or state_of(0)).step == 6)
    record.close()
    assert [state.step if state else 0 for state in seen] == [0, 1, 2, 3, 4, 5]
    assert state_files(client, run_id) == ["step-6.ckpt"]
    store = StateStore(client, spec.tracking.tracking_uri, run_id)  # type: ignore[union-attr]
    assert store.download(store.newest(), tmp_path / "copy")  # type: ignore[arg-type]
    assert (tmp_path / "copy").read_text() == "state 6"


def state_of(step: int) -> StoredState:
    return StoredState(path="", step=step, inputs="x", sha256="")


@pytest.fixture
def impatient(spec: TrainerSpec) -> Callable[[], MLflowRecord]:
    """A second attempt that waits two seconds for MLflow."""

    def make() -> MLflowRecord:
        file = spec.work_dir / SPOOL_FILE
        return open_mlflow_record(retried(spec), file, close_timeout=0.2, patience=2.0)

    return make


def test_an_outage_stops_only_an_attempt_that_has_nothing_to_go_on_from(
    server: MLflowServer, impatient: Any, last: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    record = impatient()
    with pytest.raises(RecordUnavailableError, match="MLflow does not say where to go on"):
        record.restore_state(last, step=None, inputs="x", give_up=never)
    assert record.restore_state(save(last, "mine"), step=7, inputs="x", give_up=never) is None
    record.close()
    assert last.read_text() == "mine"
    assert "MLflow does not say whether it has a newer state than step 7" in caplog.text


def test_a_state_waits_for_the_metrics_before_it(
    client: MlflowClient, run_id: str, spec: TrainerSpec, last: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics that cannot be sent hold it up; a retry behind it would leave a gap in them."""
    record = open_record(spec, close_timeout=0.5)
    log_batch, seen = MlflowClient.log_batch, Event()

    def failing(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if not seen.is_set():
            assert stored_state(client, run_id) is None
            raise ConnectionError("no metrics now")
        return log_batch(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    record.log_metrics({"train_loss": 1.0}, 1)
    record.log_state(save(last, "state 1"), step=1, inputs="x", must=True)
    wait_until(lambda: state_files(client, run_id) == ["step-1.ckpt"])
    assert TAG_RESUME_STATE not in client.get_run(run_id).data.tags
    seen.set()
    wait_until(lambda: stored_state(client, run_id))
    assert points(client, run_id) == [(1, 1.0)]
    record.close()
